"""fasttune eval of several runs: the same problems or none, what is seen and how, no memory left for the next run.

`write` makes the files of an evaluation without a model; the real command on two models is the last test.
"""

import argparse
import dataclasses
import html
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
from rich.console import Console

from fasttune import child_process, cli
from fasttune.tools import compare, compare_page, evaluated, paired, proportions

SCORES: dict[str, Any] = {
    "model": "m",
    "weights": "m/adapter",
    "tasks": ["sums"],
    "data": None,
    "limit": None,
    "batch_rows": 16,
    "dtype": "float32",
    "requests": 4,
    "from_cache": 0,
    "seconds": 1.5,
    "date": "2026-11-26T12:00:00",
    "hardware": "Some CPU, 2 cores, 23 GiB, no GPU",
    "versions": {"fasttune": "1", "lm_eval": "0.4.13", "torch": "2.13.0"},
    "warnings": [],
}


def write(folder: Path, chance: float | None = None, changes: dict[str, Any] | None = None, **tasks: Any) -> str:
    """The files of an evaluation: for each task a string with 1 for each problem answered right, or its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for task, right in tasks.items():
        for at, one in enumerate(right):
            line = one if isinstance(one, dict) else {"right": one == "1"}
            lines.append({"task": task, "number": at + 1, "id": f"{task}-{at}", "target": at % 4} | line)
    rows = [{"task": task, "metric": "acc", "value": 0.5, "stderr": None, "chance": chance} for task in tasks]
    (folder / "eval.json").write_text(json.dumps(SCORES | {"scores": rows} | (changes or {})))
    (folder / "eval_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def compared(*folders: str) -> paired.Comparison:
    return paired.compare([evaluated.read(Path(folder).name, Path(folder)) for folder in folders])


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["eval", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


# --- of files


def test_a_difference_is_of_the_same_problems(tmp_path: Path) -> None:
    """By their id, in whichever order they stand; right is taken from the metrics where a line does not say it."""
    first = write(tmp_path / "first", chance=0.25, sums="1" * 30 + "0" * 30)
    lines = [{"id": f"sums-{at}", "target": at % 4, "metrics": {"acc": float(at < 45)}} for at in range(60)]
    second = write(tmp_path / "second", chance=0.25, sums=lines[::-1])
    third = write(tmp_path / "third", chance=0.25, sums="1" * 10 + "0" * 50)
    task = compared(first, second, third).tasks[0]
    assert [each.right for each in task.runs] == [30, 45, 10]
    assert [each.against_chance for each in task.runs] == ["above", "above", "not different"]
    pair = task.pairs[0]
    assert (pair.run, pair.over, pair.both_right) == ("second", "first", 30)
    assert (pair.only_run_right, pair.only_over_right, pair.problems) == (15, 0, 60)
    assert pair.difference == 0.25 and pair.p == 2 / 2**15 and pair.better == "second"
    assert [each.p_holm for each in task.pairs] == proportions.holm([each.p for each in task.pairs])
    assert [each.better for each in task.pairs] == ["second", "first", "second"]


def test_the_correction_decides_what_is_seen(tmp_path: Path) -> None:
    """p = 0.0312 for six to nothing: seen of two runs, not of three."""
    first, second = (write(tmp_path / name, sums=right) for name, right in (("a", "0" * 40), ("b", "1" * 6 + "0" * 34)))
    third = write(tmp_path / "c", sums="0" * 37 + "111")
    assert compared(first, second).tasks[0].pairs[0].better == "b"
    found = compared(first, second, third)
    assert [each.better for each in found.tasks[0].pairs] == [None, None, None]
    assert found.tasks[0].pairs[0].p < found.alpha < found.tasks[0].pairs[0].p_holm
    assert found.correction == "Holm's, over the 3 pairs of runs within each task"


def test_problems_that_one_did_not_answer_are_counted_and_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a", sums="1100110011", ranks="10")
    second = write(tmp_path / "b", sums="1111", perplexity=[{"metrics": {"word_perplexity": 3.0}}])
    found = compared(first, second)
    assert found.tasks[0].pairs[0].problems == 4 and [each.problems for each in found.tasks[0].runs] == [10, 4]
    (missing,) = found.unpaired
    assert (missing["not_answered_by"], missing["problems"]) == ("b", 6) and missing["first"][0] == "sums-4"
    assert found.not_compared == [
        {"task": "ranks", "why": "not answered by b"},
        {"task": "perplexity", "why": "not answered by a"},
    ]


def test_the_mean_gives_each_task_the_same_weight(tmp_path: Path) -> None:
    first = write(tmp_path / "a", small="10", large="1" * 10 + "0" * 90)
    found = compared(first, write(tmp_path / "b", small="11", large="1" * 20 + "0" * 80))
    assert [(each.run, each.over, each.value) for each in found.mean] == [
        ("a", None, pytest.approx(0.3)),
        ("b", None, pytest.approx(0.6)),
        ("b", "a", pytest.approx(0.3)),
    ]
    assert all(each.low < each.value < each.high for each in found.mean)


def test_a_row_that_is_there_twice_is_two_problems(tmp_path: Path) -> None:
    """Where the id is a hash of the problem."""
    first, second = ([{"id": "same", "target": 0, "right": right == "1"} for right in said] for said in ("110", "011"))
    found = compared(write(tmp_path / "a", sums=first), write(tmp_path / "b", sums=second)).tasks[0].pairs[0]
    assert (found.problems, found.both_right, found.only_run_right, found.only_over_right) == (3, 1, 1, 1)


def test_options_of_each_evaluation_are_passed_on_whatever_they_are() -> None:
    options = vars(cli.parser().parse_args(["eval", "a", "b", "--out", "x", "--no-cache", "--limit", "3"]))
    del options["chat_template"]
    asked = argparse.Namespace(**options, chat_template=False, fewshot=None, plain=True)
    assert compare.flags(asked) == ["--limit", "3", "--no-cache", "--no-chat-template", "--plain"]


def test_filters_of_one_task_are_tasks_of_their_own(tmp_path: Path) -> None:
    both = [{"filter": name, "metrics": {"exact_match": 1.0}, "id": None} for name in ("strict", "loose")]
    both[1] |= {"number": 1, "target": 0}
    folder = write(tmp_path / "a", sums=both)
    found = compared(folder, write(tmp_path / "b", sums=both))
    assert [task.task for task in found.tasks] == ["sums (strict)", "sums (loose)"]


@pytest.mark.parametrize(
    ("changes", "lines", "said"),
    [
        ({"limit": 3}, "1100", "limit none for a, 3 for b"),
        ({"data": "rows.jsonl"}, "1100", "data none for a, rows.jsonl for b"),
        ({"tasks": ["sums", "ranks"]}, "1100", "tasks sums for a, ranks, sums for b"),
        ({"versions": {"fasttune": "1", "lm_eval": "0.5"}}, "1100", "version of lm_eval 0.4.13 for a, 0.5 for b"),
        ({"versions": {"fasttune": "2", "lm_eval": "0.4.13"}}, "1100", "version of fasttune 1 for a, 2 for b"),
        ({"scores": "none"}, "1100", "scores is missing or of another kind"),
        ({}, [{"right": True, "target": 9}], "problem sums-0 of sums has another right answer for a than for b"),
        ({}, [{"right": True, "id": "other"}], "a and b share none of sums"),
        ({}, [{"task": 7}], "line 1: is no answer to a problem"),
        ({}, [], "nothing can be compared (sums: not answered by b)"),
    ],
)
def test_what_is_not_of_the_same_problems_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], lines: Any, said: str
) -> None:
    first = write(tmp_path / "a", sums="1010")
    second = write(tmp_path / "b", changes=changes, sums=lines)
    code, out, err = command(capsys, first, second, "--out", str(tmp_path / "out"))
    assert code == 2 and not out and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_and_options_that_fit_no_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished_run: Path
) -> None:
    first, second = (write(tmp_path / name, sums="10") for name in "ab")
    run = str(finished_run)
    for arguments, said in (
        ((first, f"{tmp_path}/./a"), "is the same as"),
        ((run, str(finished_run / "adapter")), "name each run once"),
        ((first, second, "--limit", "3"), "--limit would be ignored: all of these are evaluated already"),
        ((first, "nowhere/at/all"), "nowhere/at/all: no such folder"),
        ((first, "--tasks", "hellaswag", "builtin:tiny", "--data", "builtin:arithmetic"), "--data would be ignored"),
        (("builtin:tiny", *["builtin:tiny"] * compare.MOST), "at most 26"),
        ((first, second, "--out", "/proc/none"), "--out /proc/none"),
    ):
        code, out, err = command(capsys, *arguments)
        assert code == 2 and not out and said in err and err.count("\n") == 1, err


def test_runs_that_would_be_asked_their_own_rows_are_refused(tmp_path: Path, finished_run: Path) -> None:
    import yaml

    copies = []
    for name in ("one", "two"):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps({"question": name, "answer": "#### 1"}) + "\n")
        copies.append(tmp_path / name)
        shutil.copytree(finished_run, copies[-1])
        settings = yaml.safe_load((copies[-1] / "config.yaml").read_text())
        settings["data"] |= {"eval": str(rows)}
        (copies[-1] / "config.yaml").write_text(yaml.safe_dump(settings))
    options = cli.parser().parse_args(["eval", *map(str, copies)])
    with pytest.raises(compare.FasttuneError, match=r"asked other problems .*one.jsonl; .*two.jsonl.*give --data"):
        compare.plan(options)
    options.data = str(tmp_path / "one.jsonl")
    assert list(compare.plan(options)) == ["one", "two"]


def test_names_are_told_apart() -> None:
    found = compare.distinct(["/x/runs/a", "/y/runs/a", "/x/b", "org/a", "builtin:tiny"])
    assert found == ["x/runs/a", "y/runs/a", "b", "org/a", "builtin:tiny"]


# --- the processes

CHILD = """
import json, os, sys
log, name = sys.argv[1], sys.argv[3]
before = [json.loads(line) for line in open(log)] if os.path.exists(log) else []
alive = [each["pid"] for each in before if os.path.exists(f"/proc/{each['pid']}")]
with open(log, "a") as file:
    print(json.dumps({"pid": os.getpid(), "alive": alive, "arguments": sys.argv[2:]}), file=file)
if "bad" in name:
    sys.exit(int(name[-1]) or os.kill(os.getpid(), 9))
print(json.dumps({"output_dir": os.environ["SCORES"] + "/" + name.replace(":", "-")}))
"""


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """In place of `fasttune eval`: a process that notes what it was given and which of those before it still live."""
    log = tmp_path / "log"

    def started(module: str, *arguments: str) -> list[str]:
        assert module == "fasttune.cli"
        return [sys.executable, "-c", CHILD, str(log), *arguments]

    monkeypatch.setattr(child_process, "command", started)
    monkeypatch.setenv("SCORES", str(tmp_path))
    monkeypatch.setattr(compare.trained_model, "open_run", lambda name, trust: Opened(name))
    monkeypatch.setattr(compare.evaluate, "choose", lambda *_: (["sums"], None, ""))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


@dataclasses.dataclass
class Opened:
    weights: str
    run: Path | None = None


def test_a_process_has_ended_before_the_next_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], children: Callable[[], list[dict[str, Any]]]
) -> None:
    """So that no memory of a model is left; each gets the options of the command, and files that are there none."""
    for name in ("one", "two"):
        write(tmp_path / f"builtin-{name}", sums="10")
    there = write(tmp_path / "there", sums="11")
    options = ("--tasks", "sums", "--limit", "2", "--no-cache", "--json")
    code, out, err = command(capsys, "builtin:one", there, *options, "builtin:two", "--out", str(tmp_path / "out"))
    assert code == 0, err
    ran = children()
    assert [each["alive"] for each in ran] == [[], []] and ran[0]["pid"] != os.getpid()
    given_options = ["--tasks", "sums", "--limit", "2", "--no-cache", "--json"]
    assert [each["arguments"] for each in ran] == [
        ["eval", "builtin:one", *given_options],
        ["eval", "builtin:two", *given_options],
    ]
    assert [each["name"] for each in json.loads(out)["runs"]] == ["builtin:one", "there", "builtin:two"]


@pytest.mark.parametrize(("name", "code"), [("builtin:bad2", 2), ("builtin:bad1", 1), ("builtin:bad0", 1)])
def test_what_is_evaluated_stays_when_another_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    children: Callable[[], list[dict[str, Any]]],
    name: str,
    code: int,
) -> None:
    for each in ("one", "two"):
        write(tmp_path / f"builtin-{each}", sums="10")
    found, out, err = command(capsys, "builtin:one", name, "builtin:two", "--out", str(tmp_path / "out"))
    assert found == code and not out and len(children()) == 3
    assert f"no comparison, as {name} failed" in err.splitlines()[-1]
    assert f"kept: builtin:two in {tmp_path}/builtin-two" in "".join(err.splitlines())
    assert ("ended by signal 9" in err) == (name == "builtin:bad0") and not (tmp_path / "out").exists()


# --- the page


def example(tmp_path: Path, **names: str) -> paired.Comparison:
    first, second, third = (names.get(each, each) for each in ("one", "two", "three"))
    folders = [
        write(tmp_path / first, 0.25, sums="1" * 10 + "0" * 30, ranks="1" * 20 + "0" * 20, odd="1"),
        write(tmp_path / second, 0.25, sums="0" * 29 + "1" * 11, ranks="1" * 22 + "0" * 18),
        write(
            tmp_path / third,
            0.25,
            {"dtype": "bfloat16", "chat_template": False},
            sums="0" * 40,
            ranks="0" * 18 + "1" * 18,
        ),
    ]
    return compared(*folders)


def test_the_page_says_what_is_seen_and_loads_nothing(tmp_path: Path) -> None:
    found = example(tmp_path)
    compare_page.write(found, tmp_path / "out")
    goldens.contract("eval --json of several", json.loads((tmp_path / "out" / "compare.json").read_text()))
    text = (tmp_path / "out" / "compare.html").read_text()
    assert not re.search(r"<(script|link|iframe|img|object|embed|base)\b|@import|@font-face|url\((?!#)", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    seen = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
    for part in (
        "A is better than C on sums: +25.0 points",
        "No difference seen between any two runs: on ranks (1 of 2 tasks)",
        "B is not different from chance: on sums (1 of 2 tasks)",
        "C is below chance: on sums",
        "Holm's, over the 3 pairs of runs within each task. Nothing is corrected over tasks",
        "not evaluated with the same dtype (one: float32, two: float32, three: bfloat16)",
        "Does not say that two runs are equal",
        "not evaluated with the same chat template (one: None, two: None, three: False)",
        "bfloat16, 16 problems at once, no chat template",
        "not tested",
    ):
        assert part in seen, part
    spoken = (
        'aria-label="Accuracy with 95 % interval on sums: A 25.0 % (14.2–40.2), B 27.5 % (16.1–42.8), C 0.0 % (0.0–'
    )
    assert spoken in text and "chance 25.0 %" in text
    drawn = text[text.index("<svg") : text.index("</svg>")]
    assert drawn.count("fill: var(--paper)") == 2 and "var(--warn)" in drawn  # hollow: A and B; a line for chance


def test_the_page_escapes_what_others_wrote(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    found = example(tmp_path, two=f"{evil[:-1]}>two")
    tasks = [dataclasses.replace(task, task=evil + task.task) for task in found.tasks]
    missing = {"task": evil, "not_answered_by": evil, "problems": 1, "first": [evil + "first"]}
    asked = {"tasks": [evil], "data": evil + "data", "limit": 3}
    changed = dataclasses.replace(found, tasks=tasks, warnings=[evil + "warning"], unpaired=[missing], asked=asked)
    compare_page.write(changed, tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text()
    assert "<img" not in text
    for word in ("two", "sums", "warning", "data", "first"):
        assert html.escape(evil) + word in text, word


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_every_pair(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    compare_page.show(example(tmp_path), tmp_path / "out", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines()[:-2])
    for part in (
        r"  sums +\n +40 +25\.0 +25\.0 +27\.5 +0\.0 *\n +14\.2–40\.2",
        r"C − A +−25\.0 +−40\.2 to −\d+\.\d +0\.004 +A better",
        r"  ranks +\n +B − A +\+5\.0 +−\d\.\d to \+\d+\.\d +1\.000 +no difference seen",
        r"mean over tasks +\n +B − A .*not tested",
        r"warning not evaluated with the same dtype",
        r"out/compare\.html\n",
    ):
        assert re.search(part, text), f"{part}\n{text}"


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_command_compares_two_models(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    finished_run: Path,
    apart: bool,
) -> None:
    """By night each in its process, which imports all libraries; otherwise one after the other in this one."""

    def here(name: str, options: Any) -> Path:
        asked = cli.parser().parse_args(["eval", name, *compare.flags(options)])
        return Path(compare.evaluate.run(asked)["output_dir"])

    if not apart:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fasttune.tools import harness  # noqa: F401
        monkeypatch.setattr(compare, "in_a_process", here)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / "run")
    options = ("--tasks", "builtin:arithmetic", "--limit", "2", "--out", "both", "--json")
    code, out, err = command(capsys, "run", "builtin:tiny", *options)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "both" / "compare.json").read_text())
    assert "<h1>2 runs compared</h1>" in (tmp_path / "both" / "compare.html").read_text()
    assert [each["name"] for each in document["runs"]] == ["run", "builtin:tiny"]
    (folder,) = (tmp_path / "runs").iterdir()  # where a single evaluation of a model writes its own
    for place in (tmp_path / "run", folder):
        assert json.loads((place / "eval.json").read_text())["limit"] == 2
        assert len((place / "eval_samples.jsonl").read_text().splitlines()) == 2
    assert document["tasks"][0]["pairs"][0]["problems"] == 2
    assert "no difference seen" in err
