"""The benchmarks of `fasttune eval --data FOLDER`: rows in the form of their files, their authors' scoring, chance."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import score, write

from fasttune.errors import DataError, FasttuneError
from fasttune.tools import evaluate
from fasttune.tools.tasks import benchmarks
from fasttune.tools.trained_model import TrainedModel, open_run


def pacute(number: int, asked: str, right: Any, *wrong: Any) -> dict[str, Any]:
    """A row of affixation_mcq.jsonl and its three sisters."""
    options = {"correct": right} | {f"incorrect{n}": text for n, text in enumerate(wrong, 1)}
    choices = {f"choice{n}": text for n, text in enumerate([*wrong, right], 1)}
    prompt = {"text_en": asked, "text_tl": "Alin?", "mcq_options": options, **choices}
    return {"category": "c", "prompts": [prompt], "label": "D", "id": f"mcq_{number:05}"}


def pacute_gen(number: int, asked: str, right: str) -> dict[str, Any]:
    return {"category": "c", "prompts": [{"text_en": asked, "text_tl": "?"}], "label": right, "id": f"gen_{number:05}"}


def hierarchical(number: int, asked: str, right: str, options: list[str]) -> dict[str, Any]:
    told = {"level": 0, "prompt_en": "Which?", "prompt_tl": asked, "word": "w", "metadata": {"position": number}}
    return told | {"options": options, "answer": right, "id": f"h_{number:05}"}


def asks(number: int, question: str, answer: str, *wrong: str) -> dict[str, Any]:
    """LangGame, CUTE and addition: the answer stands first."""
    told = {"question": question, "answer": answer, "id": f"q_{number:05}"}
    return told | ({"options": [answer, *wrong]} if wrong else {})


FILES: dict[str, list[dict[str, Any]]] = {
    "affixation_mcq.jsonl": [
        pacute(0, 'Which has "mag-"?', "mag-ulan", "ulan", "umulan", "pag-ulan"),
        pacute(1, 'Which has "um-"?', "umupo", "upo", "mupo", "umupo"),
    ],
    "composition_mcq.jsonl": [pacute(0, 'Which spells "bata"?', "b a t a", "b t a", "ba ta", "b a a t")],
    "manipulation_mcq.jsonl": [pacute(0, 'Which has "z" after "t" in "bata"?', "batza", "bazta", "bata", "zbata")],
    "syllabification_mcq.jsonl": [pacute(0, 'How many syllables has "halaman"?', 3, 2, 4, 5)],
    "hierarchical_mcq.jsonl": [
        hierarchical(0, "Ano ang ika-2 karakter sa 'puno'?", "u", ["o", "u", "p", "n"]),
        hierarchical(1, "Ano ang ika-1 karakter sa 'pata'?", "p", ["a", "t", "a", "p"]),
        hierarchical(2, "Ano ang ika-4 karakter sa 'basa'?", "a", ["s", "a", "a", "b"]),
    ],
    "langgame_mcq.jsonl": [asks(0, "Which is the shortest? Answer:", " he", " supply", " believe")],
    "multi_digit_addition_mcq.jsonl": [asks(0, "120+7=", "127", "128", "117", "1270")],
    "affixation_gen.jsonl": [pacute_gen(0, 'Add "mag-" to "ulan".', "mag-ulan")],
    "composition_gen.jsonl": [pacute_gen(0, 'Spell "bata".', "b a t a")],
    "manipulation_gen.jsonl": [pacute_gen(0, 'Write "bata" in capitals.', "BATA")],
    "syllabification_gen.jsonl": [pacute_gen(0, 'Stress of "halamán"?', "mabilis (acute: á)")],
    "hierarchical_gen.jsonl": [hierarchical(0, "Ano ang ika-2 karakter sa 'puno'?", "u", [])],
    "langgame_gen.jsonl": [asks(0, "Which is the shortest? Answer:", " he")],
    "multi_digit_addition_gen.jsonl": [asks(0, "120+7=", "127"), asks(1, "1+1=", "2")],
    "cute_gen.jsonl": [asks(0, 'Question: Spell " hat ".', "h a t"), asks(1, 'Question: Is " h " in " hat "?', "Yes")],
}


@pytest.fixture(scope="module")
def harness(unsloth: None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fasttune.tools import harness
    return harness


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "benchmarks"
    made.mkdir()
    for name, rows in FILES.items():
        write(made / name, rows)
    return made


def test_every_form_is_read(folder: Path) -> None:
    """Whole numbers as text, no doubled space, and the answer is the one that the row names, wherever it stands."""
    for name, form in benchmarks.FORMS.items():
        problems = list(benchmarks.rows(name, str(folder))["test"])
        assert [problem["id"] for problem in problems] == [row["id"] for row in FILES[form.file]]
        for problem in problems:
            assert problem["prompt"] and problem["answer"] == problem["answer"].strip()
            if form.options:
                assert problem["options"].index(problem["answer"]) == problem["right"]  # of equals the first
                assert all(option == option.strip() for option in problem["options"])
    asked = {name: benchmarks.rows(name, str(folder))["test"][0] for name in benchmarks.NAMES}
    assert asked["hierarchical"]["prompt"].startswith("Ano") and asked["hierarchical"]["answer"] == "u"
    assert sorted(asked["pacute_syllabification"]["options"]) == ["2", "3", "4", "5"]
    assert sorted(asked["langgame"]["options"]) == ["believe", "he", "supply"]
    assert asked["cute"]["prompt"] == 'Question: Spell " hat ". Answer: "'


def test_equal_likelihoods_do_not_favour_the_answer(tmp_path: Path) -> None:
    """It stands first in every row of the file, and argmax takes the first of equals."""
    rows = [asks(n, f"{n}+1=", str(n + 1), str(n), str(n + 2), str(n + 3)) for n in range(200)]
    write(tmp_path / "multi_digit_addition_mcq.jsonl", rows)
    found = [problem["right"] for problem in benchmarks.rows("addition", str(tmp_path))["test"]]
    assert all(30 < found.count(place) < 70 for place in range(4))


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("pacute_affixation", {"prompts": []}, "has no prompts.0.text_en (it has prompts)"),
        ("pacute_affixation", pacute(0, " ", "a", "b"), "prompts.0.text_en is ' ', expected text"),
        ("pacute_affixation", pacute(0, "q", "a"), "expected two options or more"),
        ("pacute_affixation", pacute(0, "q", "a", None), "incorrect1 is 'None', expected text"),
        ("hierarchical", hierarchical(0, "q", "c", ["a", "b"]), "the answer 'c' is none of its options"),
        ("langgame", asks(0, "q", "a"), "has no options"),
        ("cute", {"question": "q"}, "has no answer"),
    ],
)
def test_a_row_that_cannot_be_asked_is_told_in_one_line(
    folder: Path, task: str, row: dict[str, Any], said: str
) -> None:
    file = benchmarks.FORMS[task].file
    write(folder / file, [*FILES[file], row])
    with pytest.raises(DataError) as caught:
        benchmarks.rows(task, str(folder))
    assert said in str(caught.value) and f"{file} line {len(FILES[file]) + 1}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_and_folders(folder: Path, tmp_path: Path) -> None:
    model = open_run("builtin:tiny")
    names, data, _ = evaluate.choose("pacute, cute,pacute_affixation", str(folder), model)
    assert (names, data) == ([*benchmarks.GROUPS["pacute"], "cute"], str(folder))
    assert {*benchmarks.GROUPS["filipino_mcq"], *benchmarks.GROUPS["filipino_gen"]} == set(benchmarks.NAMES)
    (folder / "cute_gen.jsonl").unlink()
    rows = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "#### 1"}])
    for arguments, said in (
        (("cute", str(folder)), "has no cute_gen.jsonl, which --tasks cute reads"),
        (("addition", rows), "rows.jsonl: is no folder"),
        (("langgame", None), "add --data FOLDER that holds langgame_mcq.jsonl"),
        ((None, str(folder)), "is a folder, which no task reads by itself; say --tasks pacute or filipino"),
        (("gsm8k_jsonl", str(folder)), "which --tasks gsm8k_jsonl does not read; say --tasks pacute or"),
        (("langgam", str(folder)), "say --tasks langgame"),
        (("langgame,gsm8k_jsonl", str(folder)), "gsm8k_jsonl: reads no folder, langgame does"),
    ):
        with pytest.raises(FasttuneError) as caught:
            evaluate.choose(*arguments, model)
        assert said in str(caught.value)


def test_choices_are_those_of_plain_transformers(folder: Path, tmp_path: Path, harness: Any) -> None:
    """The sum of log-likelihoods of the option's tokens after `prompt + " "`, not divided by any length."""
    from fasttune.core import model as models
    from fasttune.tools import trained_model

    result, lines = score(tmp_path, tasks="filipino_mcq", data=folder, no_cache=True)
    assert len(lines) == sum(len(FILES[benchmarks.FORMS[name].file]) for name in benchmarks.CHOICES) == 10
    model, tokenizer = trained_model.load(open_run("builtin:tiny"), "float32")

    def likelihood(prompt: str, option: str) -> float:
        before, ids = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, f"{prompt} {option}"))
        with models.torch.inference_mode():
            found = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        start = before.shape[1]
        return float(found[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum())

    for line in lines:
        (row,) = (row for row in FILES[benchmarks.FORMS[line["task"]].file] if row["id"] == line["id"])
        told = row.get("prompts", [row])[0]
        prompt = told.get("text_en") or told.get("prompt_tl") or told["question"]
        options = told["mcq_options"].values() if "mcq_options" in told else row["options"]
        right = told["mcq_options"]["correct"] if "mcq_options" in told else row["answer"]
        by_text = {str(option).strip(): likelihood(prompt, str(option).strip()) for option in options}
        asked = {text.strip(): found[0] for text, found in zip(line["options"], line["responses"], strict=True)}
        assert line["prompt"] == prompt and asked == pytest.approx(by_text, abs=1e-3)
        assert line["right"] == (max(by_text, key=lambda text: by_text[text]) == str(right).strip())
    assert {line["right"] for line in lines} == {True, False}
    assert {(each.metric, each.problems) for each in result.scores} == {("acc", 1), ("acc", 2), ("acc", 3)}
    told = "\n".join(result.warnings)
    assert "pacute_affixation: the same option is offered twice in 1 of 2 problems" in told
    assert (
        "hierarchical: the same option is offered twice in 2 of 3 problems" in told
        and "(25.0 %), over different ones it is 30.6 %" in told
    )
    assert len(result.warnings) == 2 and (result.chat_template, result.requests) == (
        False,
        36,
    )  # the same option is asked once
    by_task = {each.task: each for each in result.scores}
    assert (by_task["langgame"].chance, by_task["addition"].chance) == (pytest.approx(1 / 3), 0.25)


WRITTEN = {  # task → what a model wrote, whether it is right; CUTE's is cut at its quote before
    "pacute_affixation_gen": [("\n Mag-Ulan ", True)],
    "pacute_composition_gen": [("bata", False)],
    "pacute_manipulation_gen": [("BATA\nand more", False)],
    "pacute_syllabification_gen": [("mabilis (acute: á)", True)],
    "hierarchical_gen": [("u.", False)],
    "langgame_gen": [("he", True)],
    "addition_gen": [(" = 127.\n", True), ("three", False)],
    "cute": [(' H a t " and then', True), ("Yes, it is", False)],
}


def test_written_answers_are_judged_as_their_authors_do(
    folder: Path, tmp_path: Path, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = set()

    def generate(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for request in requests:
            limits.add((request.args[1]["max_gen_toks"], request.args[1]["do_sample"]))
            text = WRITTEN[request.task_name][request.doc_id][0]
            answers.append(text.partition(stops[0])[0] if (stops := request.args[1]["until"]) else text)
        return answers

    monkeypatch.setattr(harness.HFLM, "generate_until", generate)
    result, lines = score(tmp_path, tasks="filipino_gen", data=folder, no_cache=True)
    assert limits == {(50, False)}
    for task, expected in WRITTEN.items():
        assert [line["right"] for line in lines if line["task"] == task] == [right for _, right in expected]
    assert next(line for line in lines if line["task"] == "cute")["extracted"] == "h a t"
    told = {each.task: (each.metric, each.value, each.low, each.chance) for each in result.scores}
    assert told["addition_gen"] == ("contained", 0.5, pytest.approx(0.0945, abs=1e-3), None)
    assert told["langgame_gen"][:2] == ("exact_match", 1.0)


def test_a_model_without_a_template_is_asked_plainly(tmp_path: Path, harness: Any) -> None:
    from fasttune.core import pretrained

    base = tmp_path / "base"
    shutil.copytree(pretrained.builtin("builtin:tiny"), base)
    for path in base.glob("*.jinja"):
        path.unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = write(tmp_path / "rows.jsonl", [{"question": "2 + 2?", "answer": "c", "options": ["x", "yz", "c"]}])
    plain, (line,) = score(tmp_path / "plain", str(base), data=rows, no_cache=True)
    assert (plain.chat_template, plain.chat_template_reason) == (False, "the model has no chat template")
    assert (line["prompt"], line["options"]) == ("2 + 2?", [" x", " yz", " c"])
    turns, (line,) = score(tmp_path / "turns", str(base), data=rows, no_cache=True, chat_template=True)
    assert turns.chat_template and line["prompt"] != "2 + 2?" and line["prompt"].strip().endswith("Assistant:")


def test_when_prompts_go_through_the_template(finished_run: Path, unsloth: None) -> None:
    def asked(flag: bool | None, names: list[str], model: TrainedModel) -> bool:
        return evaluate.asked_in_turns(flag, names, model)[0]

    chat = open_run(str(finished_run))
    assert chat.config
    data = chat.config.data.model_copy(update={"format": "text"})
    text = replace(chat, config=chat.config.model_copy(update={"data": data}))
    assert asked(None, ["gsm8k_jsonl"], chat) and not asked(None, ["gsm8k_jsonl"], text)
    assert not asked(False, ["gsm8k_jsonl"], chat) and asked(True, ["langgame"], text)
    assert not asked(None, ["langgame", "cute"], chat)
    with pytest.raises(FasttuneError, match=r"langgame is asked as plain text, hellaswag .*; add --no-chat-template"):
        asked(None, ["langgame", "hellaswag"], chat)
    assert not asked(None, ["langgame", "hellaswag"], text)
