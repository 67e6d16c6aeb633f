"""The command line: quick help, one line for every user error, nothing half-written."""

import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fasttune import cli, config, system
from fasttune.core import prepare, run_folder
from fasttune.errors import ConfigError, DataError

TINY = "model: {name: builtin:tiny}\ndata: {train: builtin:arithmetic}\n"


@pytest.fixture
def fasttune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in a folder that holds tiny.yaml; returns its exit code and what stderr got."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)

    def run(*arguments: str) -> tuple[int, str]:
        code = cli.main([*arguments])
        said = capsys.readouterr()
        assert said.out == ""
        return code, said.err

    return run


def test_help_answers_at_once() -> None:
    script = str(Path(sys.executable).with_name("fasttune"))
    seconds = []  # of the processor: what else the machine does is not its fault
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "train" in done.stdout and "verify" in done.stdout
    assert statistics.median(seconds) < 0.3


def test_a_user_error_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "fasttune.cli", "train", "tiny.yaml", "train.batch_size=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "did you mean train.batch_rows?" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(("is_terminal", "bars"), [(True, None), (False, "1")])
def test_libraries_draw_no_bars_into_a_pipe(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, bars: str | None
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")  # put back as it was behind this test
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "argv", ["fasttune", "train", "nowhere.yaml"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(system, "leave_current_folder", lambda: None)
    assert cli.main() == 2
    assert os.environ.get("TQDM_DISABLE") == bars


def test_a_finished_run_is_not_resumed_and_that_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"{run_folder.MARK}\n{TINY}")
    (tmp_path / "run.json").write_text('{"status": "completed"}')
    command = [sys.executable, "-X", "importtime", "-m", "fasttune.cli", "train", "--resume", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"{tmp_path} is completed, nothing is left to do" in done.stderr
    assert not re.search(r"\| +(torch|transformers|unsloth|datasets)$", done.stderr, re.M)


def test_the_newest_run_of_a_name_is_finished(fasttune: Any, tmp_path: Path) -> None:
    for name, status in (("x-20260101-000000", "interrupted"), ("x-20260102-000000", "completed")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"{run_folder.MARK}\n{TINY}")
        (run / "run.json").write_text(f'{{"status": "{status}"}}')
        if status == "interrupted":
            (run / "checkpoints").mkdir()
    code, said = fasttune("train", "tiny.yaml", "name=x", "--resume")
    assert code == 2 and "runs/x-20260102-000000 is completed, nothing is left to do" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["init", "--out", "mine.yaml"], "--out mine.yaml would be ignored"),
        (["generate", "builtin:tiny", "--prompt", "x", "--seed", "3"], "--seed 3 would be ignored"),
        (["plan", "tiny.yaml", "train.report_to=mlflow"], "train.report_to: input should be 'none', 'tensorboard'"),
        (["plan", "tiny.yaml", "train.report_to=[none]"], "train.report_to.0: input should be 'tensorboard'"),
        (
            ["plan", "tiny.yaml", "model.revision=main"],
            "model.revision=main would be ignored: builtin:tiny is no",
        ),
        (
            ["train", "tiny.yaml", "model.revision=main"],
            "model.revision=main would be ignored: builtin:tiny is no",
        ),
        (["tokenize", "tiny.yaml", "--out", ""], "--out: is empty"),
        (["merge", "x", "--out", "a\nb"], "--out: 'a b' holds a control character"),
    ],
)
def test_what_is_asked_in_vain_is_one_line(fasttune: Any, tmp_path: Path, arguments: list[str], told: str) -> None:
    code, said = fasttune(*arguments)
    assert code == 2 and told in said and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("redirected", "code", "told"),
    [
        (">&-", 0, ""),
        ("2>&- >/dev/null", 0, ""),
        (">/dev/full", 1, "fasttune: the output cannot be written: No space left on device; send it elsewhere\n"),
    ],
)
@pytest.mark.parametrize("command", ["init", "schema --json"])
def test_an_output_that_takes_nothing(command: str, redirected: str, code: int, told: str) -> None:
    line = f"{sys.executable} -m fasttune.cli {command} {redirected}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, told)


def test_a_chat_whose_input_is_closed_ends_at_once(finished_run: Path) -> None:
    line = f"{sys.executable} -m fasttune.cli generate {finished_run} --chat <&-"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["train", "plan", "data", "bench"])
def test_what_train_refuses_is_refused_by_those_that_look(fasttune: Any, tmp_path: Path, command: str) -> None:
    Path("empty.jsonl").write_text("\n")
    for name, told in (("nowhere.jsonl", "no file nowhere.jsonl"), ("empty.jsonl", "empty.jsonl holds no rows")):
        code, said = fasttune(command, "tiny.yaml", f"data.eval={name}")
        assert code == 2 and told in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "tiny.yaml"]


def test_held_out_rows_are_looked_at_in_their_own_split(tmp_path: Path) -> None:
    """That of the hub's rows is no split of a file."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    data = {"train": "owner/name", "split": "validation", "eval": str(tmp_path / "rows.jsonl")}
    prepare.check_sources_and_model(config.parse({"model": {"name": "builtin:tiny"}, "data": data}))


def test_names_of_columns_that_no_source_has_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    sources = {str(tmp_path / "a.jsonl"): 1.0, str(tmp_path / "b.jsonl"): 1.0}
    for columns in ({"text": "body"}, {"question": "ask", "answer": "say"}):
        with pytest.raises(DataError, match=f"data.columns: no source has {', '.join(columns.values())}"):
            prepare.check_sources_and_model(
                config.parse({"model": {"name": "builtin:tiny"}, "data": {"train": sources, "columns": columns}})
            )


def test_debug_shows_the_traceback(fasttune: Any) -> None:
    with pytest.raises(ConfigError):
        fasttune("train", "nowhere.yaml", "--debug")


def test_a_run_is_resumed_by_its_folder_alone(fasttune: Any) -> None:
    Path("old").mkdir()
    for more in ([], ["train.max_steps=0"]):
        code, said = fasttune("train", "--resume", "old", *more)
        assert (code, said.count("\n")) == (2, 1) and "old/config.yaml: cannot be read" in said
    os.mkfifo("old/config.yaml")
    code, said = fasttune("train", "--resume", "old")
    assert (code, said.count("\n")) == (2, 1) and "did not write its config.yaml" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "tiny.yaml", "data.train=" + "a/" * 1000 + "rows.jsonl"], "no file a/a/a/"),
        (["plan", "tiny.yaml", "x" * 2000 + "=1"], "unknown setting"),
        (["plan", "tiny.yaml", "y" * 2000], "not of the form key=value"),
        (["train", "c" * 300], "config: "),
        (["train"], "name a config"),
        (["train", "nowhere.yaml"], "configs/quickstart.yaml"),
        (["train", "tiny.yaml", "data.train=nowhere.jsonl"], "no file nowhere.jsonl"),
        (["train", "tiny.yaml", "model.name=builtin:large"], "builtin:tiny"),
        (["train", "tiny.yaml", "output_dir=tiny.yaml"], "is a file"),
        (["eval", "~nosuchuser/run"], "model: ~nosuchuser is no user"),
        (["generate", "builtin:tiny", "--prompt", "x", "--out", "o" * 300], "--out: "),
        (["merge", "run\udcff", "--out", "merged"], "U+DCFF"),
        (["data", "tiny.yaml", "--rows", "1000000000"], "--rows 1000000000: a whole number from 0 to 100,000"),
        (["bench", "tiny.yaml", "--repeats", "1000000000"], "--repeats"),
        (["eval", "builtin:tiny", "--limit", "0"], "--limit 0"),
    ],
)
def test_no_error_is_longer_than_a_few_lines_of_a_terminal(
    fasttune: Any, tmp_path: Path, arguments: list[str], told: str
) -> None:
    """The place is said at its beginning and the fix at its end: what is too long is cut in the middle."""
    code, said = fasttune(*arguments)
    (line,) = said.splitlines()
    assert code == 2 and line.startswith("fasttune: ") and told in line and len(line) <= 300
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    "arguments", [["data"], ["plan", "c.yaml", "--gqu"], ["data", "c", "--rows", "9" * 5000], ["verify", "-x"]]
)
def test_a_wrong_option_is_one_line_too(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(line) <= 300 and line.endswith("--help)")
