"""fasttune eval: the data set's own answer rule, problem by problem; answers kept by the weights; no network."""

import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import goldens
import pytest
from rich.console import Console

from fasttune import cli, metrics, report
from fasttune.data import arithmetic
from fasttune.errors import DataError, FasttuneError
from fasttune.tools import evaluate, tasks
from fasttune.tools.card import Score
from fasttune.tools.trained_model import open_run

PAIRS = [  # (what the data set says, what a model wrote)
    ("2 + 2 = 4\n#### 4", "It is 4.\n#### 4"),
    ("#### 1,234", "#### 1234"),
    ("#### 1234", "#### 1,234"),
    ("#### -3", "#### -3 dollars"),
    ("#### 3", "#### -3"),
    ("#### 18", "#### 18.0"),
    ("#### 18", "#### 18."),
    ("#### 18", "#### $18"),
    ("#### 18", "####18"),
    ("#### 7", "#### 8\n#### 7"),
    ("#### 7", "7"),
    ("#### 7", ""),
]
CHOICES = [
    {"question": "The shortest?", "answer": " a", "options": [" a", " bcd", " efgh"]},
    {"question": "The longest?", "answer": "C", "options": ["xy", "z", "pqrs"]},
    {"question": "The last?", "answer": 1, "options": ["yes", "no"]},
]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_width_of_a_terminal_breaks_a_name_or_loses_a_figure(width: int) -> None:
    long = "filipino_affix_inflection_multiple_choice_of_three"
    found = [
        Score(long, "acc", 0.4, 0.05, 100, low=0.31, high=0.5, chance=0.25, corrected=0.2),
        Score(long, "exact_match (strict-match)", 0.412, 0.05, 1165, low=0.31, high=0.5),
        Score("wikitext", "word_perplexity", 18.234, None, 62),
    ]
    console = Console(file=io.StringIO(), width=width, no_color=True)
    said = {"from_cache": 0, "requests": 9, "seconds": 1.0, "output_dir": "out"}
    evaluate.show({"scores": found, **said}, console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert long in lines and "wikitext" in lines and all(len(line) <= width for line in lines)
    for figures in (
        r"acc +40\.0 % \(95 %: 31 to 50\) +100 problems",
        r"exact_match.* 41\.2 % \(95 %: 31 to 50\) +1,165 problems",
        r"word_perplexity +18\.23 +62 problems",
    ):
        assert sum(bool(re.fullmatch(f"  {figures}", line)) for line in lines) == 1, figures
    assert "chance 25.0 %, above it 20.0 %" in " ".join(" ".join(lines).split())


GUARDED = """
import sys
from fasttune import cli
from fasttune.verify.smoke_train import block_network
attempts = []
block_network(attempts)
code = cli.main(sys.argv[1:])
print(attempts, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def harness(unsloth: None) -> Any:
    """The harness, imported once; what it warns of while it is, is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fasttune.tools import harness
    return harness


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(folder: Path, name: str = "builtin:tiny", **arguments: Any) -> tuple[Any, list[dict[str, Any]]]:
    options = [text for flag, value in arguments.items() for text in (f"--{flag.replace('_', '-')}", str(value))]
    command = ["eval", name, "--out", str(folder), *(text for text in options if text != "True")]
    result = evaluate.run(cli.parser().parse_args(command))
    lines = [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text().splitlines()]
    assert json.loads((folder / "eval.json").read_text()) == json.loads(report.to_json_line(result))
    return SimpleNamespace(**result), lines


def by_hand(text: str) -> str | None:
    """GSM8K's rule, written without a regular expression."""
    _, mark, tail = text.partition("#### ")
    while mark:
        sign, body = ("-", tail[1:]) if tail.startswith("-") else ("", tail)
        number = body[: len(body) - len(body.lstrip("0123456789.,"))]
        if number:
            return sign + number.replace(",", "")
        _, mark, tail = tail.partition("#### ")
    return None


def test_every_problem_is_judged_by_the_rule_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Any
) -> None:
    rows = [{"question": f"Problem {n}?", "answer": reference} for n, (reference, _) in enumerate(PAIRS)]
    written = {f"Problem {n}?": text for n, (_, text) in enumerate(PAIRS)}

    def generate(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [next(text for q, text in written.items() if q in request.args[0]) for request in requests]

    monkeypatch.setattr(harness.HFLM, "generate_until", generate)
    result, lines = score(tmp_path, data=write(tmp_path / "gsm.jsonl", rows), no_cache=True)
    assert result.tasks == ["gsm8k_jsonl"] and [line["generation"] for line in lines] == [text for _, text in PAIRS]
    expected = [by_hand(text) is not None and by_hand(text) == by_hand(reference) for reference, text in PAIRS]
    assert [line["right"] for line in lines] == expected
    assert [line["extracted"] for line in lines] == [by_hand(text) for _, text in PAIRS]
    assert 3 < sum(expected) < len(expected)
    (only,) = result.scores
    assert (only.metric, only.problems, only.value) == ("exact_match", len(PAIRS), sum(expected) / len(PAIRS))
    assert only.stderr == pytest.approx((only.value * (1 - only.value) / (len(PAIRS) - 1)) ** 0.5)


def test_a_run_is_scored_on_its_own_rows_and_its_card_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Any, finished_run: Path
) -> None:
    """Read with the columns of its config; a folder named with --out leaves the card alone."""
    import yaml

    run, rows = tmp_path / "run", [{"problem": "2 + 2?", "answer": "#### 4"}]
    shutil.copytree(finished_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"eval": write(tmp_path / "rows.jsonl", rows), "columns": {"question": "problem"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    given: dict[str, Any] = {}

    def generate(self: Any, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        given.update(settings, stop=list(stop))
        return context

    monkeypatch.setattr(harness.HFLM, "_model_generate", generate)
    score(tmp_path / "elsewhere", str(run), no_cache=True)
    assert (given["repetition_penalty"], given["num_beams"]) == (1.0, 1) and given["eos_token_id"]
    assert not any(not text.strip() for text in given["stop"])  # a blank line ends no answer
    assert "Not evaluated" in (run / "adapter" / "README.md").read_text()
    result, lines = score(run, str(run), no_cache=True)
    assert "2 + 2?" in lines[0]["prompt"] and result.tasks == ["gsm8k_jsonl"]
    assert (
        "| gsm8k_jsonl | exact_match | 0.0000 | 0.0000 to 0.7935 | – | – | 1 |"
        in (run / "adapter" / "README.md").read_text()
    )


def test_the_split_of_the_run_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, splits = tasks.sources.read, []

    def read(source: str, part: Any, split: str = "train", *more: Any, **rest: Any) -> Any:
        splits.append(split)
        return real(source, part, "train", *more, **rest)

    monkeypatch.setattr(tasks.sources, "read", read)
    source = write(tmp_path / "rows.jsonl", [{"q": "x", "answer": "#### 1"}])
    assert tasks.of_rows(source, "test", {"question": "q"}) == "gsm8k_jsonl"
    assert tasks.gsm8k(source, "test", {"question": "q"})["test"][0]["question"] == "x"
    assert splits == ["test", "test"]


def test_a_run_that_held_out_its_own_rows_is_told_what_to_give(finished_run: Path) -> None:
    from dataclasses import replace

    opened = open_run(str(finished_run))
    assert opened.config
    data = opened.config.data.model_copy(update={"eval_share": 0.1})
    opened = replace(opened, config=opened.config.model_copy(update={"data": data}))
    names, data, why = evaluate.choose(None, None, opened)
    assert names == ["builtin:arithmetic"] and "held out 10 %" in why and "--data FILE" in why


def test_the_harness_generates_what_the_model_generates(tmp_path: Path, harness: Any, tiny_tokenizer: Any) -> None:
    """Prompts are those of training, and batched answers of different lengths are the model's own greedy ones."""
    from fasttune.core import model as models
    from fasttune.data import chat
    from fasttune.tools import trained_model

    result, lines = score(tmp_path, tasks="builtin:arithmetic", limit=3, batch_rows=2, no_cache=True)
    rows = arithmetic.generate("test", rows=3)
    model, tokenizer = trained_model.load(open_run("builtin:tiny"), "float32")
    template = chat.template_of(tiny_tokenizer)
    for row, line in zip(rows, lines, strict=True):
        asked = template.render([{"role": "user", "content": row["question"]}], ask=True)
        assert (line["prompt"], line["reference"]) == (asked, row["answer"])
        ids = tokenizer(line["prompt"], return_tensors="pt", add_special_tokens=False)
        with models.torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=128, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert line["generation"] == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["right"] == arithmetic.is_right(line["generation"], row["answer"])
    assert (result.requests, result.from_cache, result.limit) == (3, 0, 3)


def test_answers_are_kept_for_these_weights_only(tmp_path: Path, harness: Any) -> None:
    import safetensors.torch

    from fasttune.core import pretrained

    rows = write(tmp_path / "choices.jsonl", CHOICES)
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    shutil.copytree(pretrained.builtin("builtin:tiny"), copy)
    shutil.copytree(copy, changed)
    weights = safetensors.torch.load_file(changed / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    safetensors.torch.save_file(weights, changed / "model.safetensors", {"format": "pt"})

    part, _ = score(tmp_path / "0", data=rows, limit=2)
    assert (part.requests, part.from_cache) == (6, 0)  # a request an option
    first, before = score(tmp_path / "1", data=rows)
    assert (first.requests, first.from_cache) == (8, 6)
    again, after = score(tmp_path / "2", str(copy), data=rows)  # the same weights, elsewhere
    assert (again.requests, again.from_cache) == (8, 8) and after == before
    other, _ = score(tmp_path / "3", str(changed), data=rows)
    assert other.from_cache == 0
    forgetful, _ = score(tmp_path / "4", data=rows, no_cache=True)
    assert forgetful.from_cache == 0


def test_an_adapter_of_another_scale_is_another_model(harness: Any, tiny_tokenizer: Any) -> None:
    import peft

    from fasttune.core import model as models, pretrained

    model = models.transformers.AutoModelForCausalLM.from_pretrained(pretrained.builtin("builtin:tiny"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    first = harness.fingerprint(model, tiny_tokenizer)
    assert harness.fingerprint(model, tiny_tokenizer) == first
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 7.0
    assert harness.fingerprint(model, tiny_tokenizer) != first


@pytest.mark.parametrize("blocked", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_command_scores_multiple_choice_without_a_network(
    tmp_path: Path, harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], blocked: bool
) -> None:
    """By night in a process of its own, which notes every attempt to reach a network."""
    monkeypatch.chdir(tmp_path)
    command = [
        "eval",
        "builtin:tiny",
        "--data",
        write(tmp_path / "choices.jsonl", CHOICES),
        "--out",
        "scores",
        "--json",
    ]
    if blocked:
        done = subprocess.run([sys.executable, "-c", GUARDED, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "[]"
        out, err = done.stdout, done.stderr
    else:
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "scores" / "eval.json").read_text())
    goldens.contract("eval --json", result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choices.jsonl", "scores"]
    lines = [json.loads(line) for line in (tmp_path / "scores" / "eval_samples.jsonl").read_text().splitlines()]
    right = []
    for line, row in zip(lines, CHOICES, strict=True):
        assert line["options"] == [option.strip() for option in row["options"]]
        likelihoods = [found[0] for found in line["responses"]]
        right.append(likelihoods.index(max(likelihoods)) == line["target"])
    assert [line["target"] for line in lines] == [0, 2, 1] and [line["right"] for line in lines] == right
    assert len({line["id"] for line in lines}) == 3
    accuracy = next(score for score in result["scores"] if score["metric"] == "acc")
    assert accuracy["value"] == pytest.approx(sum(right) / 3) and accuracy["problems"] == 3
    ends = report.interval(*metrics.wilson(sum(right), 3))
    assert f"{100 * accuracy['value']:.1f} % (95 %: {ends})" in err
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(metrics.wilson(sum(right), 3))
    chance = (1 / 3 + 1 / 3 + 1 / 2) / 3
    assert accuracy["chance"] == pytest.approx(chance)
    assert accuracy["corrected"] == pytest.approx((sum(right) / 3 - chance) / (1 - chance))
    assert all(report.percent(accuracy[share]) in err for share in ("chance", "corrected"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "q", "answer": "no number"}], "expected question, answer and options"),
        ([{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "2"}], "holds no `#### N`"),
        ([{"question": "q", "answer": "#### 1"}, {"answer": "#### 2"}], "has no question"),
        ([{"question": 5, "answer": "a", "options": ["a", "b"]}], "expected text"),
        ([{"question": "q", "answer": "c d", "options": ["a", "b"]}], "no option, no letter, no index"),
        ([{"question": "q", "answer": 2, "options": ["a", "b"]}], "no option, no letter, no index"),
        ([{"question": "q", "answer": "a", "options": ["a"]}], "two texts or more"),
    ],
)
def test_bad_rows_are_told_in_one_line(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=said) as caught:
        {"gsm8k_jsonl": tasks.gsm8k, "multiple_choice_jsonl": tasks.multiple_choice}[tasks.of_rows(source)](source)
    assert "\n" not in str(caught.value) and "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(("name", "holds"), [("a.txt", "plain text"), ("", "plain text"), ("a.bin", "tokens")])
def test_a_corpus_asks_nothing(tmp_path: Path, name: str, holds: str) -> None:
    from fasttune.tools import questions

    for file in ("a.txt", "a.bin", "a.idx"):
        (tmp_path / file).write_text("isa\n")
    source = str(tmp_path / name)
    with pytest.raises(DataError, match=rf"--data: \S+ holds {holds}, no questions: name rows .* the loss on a text"):
        tasks.of_rows(source)
    with pytest.raises(DataError, match=rf"--file: \S+ holds {holds}, no questions"):
        list(questions.read(source, {}, None, "train", {}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gsm8k_jsonl", None), "add --data FILE"),
        (("hellaswag", "builtin:arithmetic"), "--data would be ignored by hellaswag"),
        (("gsm8k_jsonl", "builtin:arithmetic"), "is not for gsm8k_jsonl"),
        ((None, "nowhere.jsonl"), "no file nowhere.jsonl"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(arguments: tuple[str | None, str | None], said: str) -> None:
    with pytest.raises(FasttuneError, match=said):
        evaluate.choose(*arguments, open_run("builtin:tiny"))


def test_an_unknown_task_names_the_nearest(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(include_defaults: bool, **arguments: Any) -> Any:  # to read all tasks of the harness takes seconds
        return manager(include_defaults=False, **arguments)

    manager = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", ours)
    with pytest.raises(FasttuneError, match=r"gsm8k_jsonI: .*did you mean gsm8k_jsonl"):
        harness.load_tasks(["gsm8k_jsonI"], None)


def test_a_missing_harness_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "NEEDS", ("no_such_package",))
    with pytest.raises(FasttuneError, match=r"no_such_package is not installed; .*setup_h100\.sh"):
        evaluate.run(cli.parser().parse_args(["eval", "builtin:tiny"]))
