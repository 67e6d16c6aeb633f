"""Every command that README, docs, configs, help texts and scripts show, from the shell's quoting to its last argument.

A command of fasttune goes through the real command line in a folder that has what the documentation names (rows.jsonl,
runs/quickstart-DATE, CONFIG …), its config and settings through config.load. What a small model does in a second is
then run, once a form; `why_only_read` says why another is not. Of scripts the file and the options are looked up.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import documented
import pytest
from documented import ROOT, Command

from fasttune import cli, config, plots
from fasttune.bench import run as bench
from fasttune.core import pretrained
from fasttune.data import arithmetic
from fasttune.tools import evaluate, merge, merge_check, trained_model
from fasttune.tools.tasks import benchmarks
from fasttune.verify import main as verify

NOT_OURS = {  # what only its owner can check
    "curl": "asks a server",
    "docker": "needs docker and a registry; the Dockerfile: tests/test_dockerfile.py",
    "git": "needs the network; the address: tests/test_wheel.py",
    "hf": "asks for an account",
    "llama-server": "llama.cpp is in no stack",
    "ollama": "is in no stack",
    "vllm": "is in no stack; the line that fasttune prints: tests/test_report.py",
}
COMMANDS = documented.commands()
OURS = [command for command in COMMANDS if command.words[0] == "fasttune"]
SCRIPTS = [command for command in COMMANDS if command.words[0] in ("bash", "python", "pytest")]

TINY = ["model.name=builtin:tiny", "model.max_length=256", "train.max_steps=2"]
QUICK = [*TINY, "data.max_rows=16", "eval.problems=1", "eval.rows=4", "samples=1", "checkpoint.max_hours=null"]
SMALL = {  # name in a config → the settings that make it a matter of a second, without a hub
    "quickstart": QUICK,
    "smollm2-135m-gsm8k": TINY,
    "smollm2-135m-cpt": [*TINY, "train.warmup_steps=1", "eval.every='1 steps'"],
    "llama3.1-8b-gsm8k": [*TINY, "data.train=rows.jsonl", "data.eval=null", "eval={}", "samples=0"],
}
RUNS = [f"runs/{name}-DATE" for name in ("quickstart", "first", "second")]
RUNS += [f"runs/quickstart-{date}" for date in ("20261121-120000", "20261126-184417")]
RUNS += ["runs/first-20261121-120000", "runs/second-20261121-130000"]
RUNS += [f"runs/{mode}{date}" for mode in ("vanilla", "stochastok", "patok") for date in ("", "-DATE")]
ran: set[tuple[str, ...]] = set()


@pytest.fixture(scope="module")
def place(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that the documentation names: one run under every name of one, and it as it was interrupted."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    rows = "".join(json.dumps(row) + "\n" for row in arithmetic.generate("train", rows=16))
    text = "".join(json.dumps({"text": f"Kumain si Ana ng {n} mangga. " * 20}) + "\n" for n in range(40))
    for name in ("rows", "train", "answers", "system", "gsm8k/test", "filipino", "corpus/part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text(text if name.startswith(("filipino", "corpus")) else rows)
    for name in ("FOLDER", "BENCHMARKS"):
        (folder / name).mkdir()
        for form in benchmarks.FORMS.values():
            (folder / name / form.file).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plots, "line_plot", lambda *_, **__: "<svg/>")
        assert cli.main(["init", "quickstart"]) == 0
        shutil.copy("config.yaml", "CONFIG")
        assert cli.main(["train", "config.yaml", *QUICK, "checkpoint.max_hours=0.000001"]) == 128 + signal.SIGTERM
        (interrupted,) = Path("runs").iterdir()
        finished = shutil.copytree(interrupted, "RUN")
        assert cli.main(["train", "--resume", "RUN", *QUICK]) == 0
        for name in RUNS:
            shutil.copytree(finished, name)
        shutil.copytree(interrupted, "runs/NAME-DATE")  # and under its own name, for a bare --resume
        yield folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that sees all of `place`; what is written into it is nobody else's."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merge, "compare", compared_in_this_process)
    return tmp_path


def compared_in_this_process(made: Path, trained: Any) -> Any:
    """tests/test_merge.py has the fresh process, which takes most of a merge's time."""
    return merge_check.compare(str(made), str(pretrained.locate(trained.base)), None, str(trained.adapter), False)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_of_fasttune(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = command.words[1:]
    if name == "verify":
        verify.parser().parse_args(arguments)  # tests/test_verify_run.py runs it
        return
    if name == "completion":
        assert cli.main([name, *arguments]) == 0
        return
    real, told = cli.COMMANDS[name], []

    def read_and_run(options: argparse.Namespace) -> Any:
        told.append(options)
        form = (*sorted(word for word in arguments if word.startswith("--")), *read(options))
        if why_only_read(options) or form in ran:
            return 0, None
        ran.add(form)
        make_small(options)
        return real(options)

    monkeypatch.setitem(cli.COMMANDS, name, read_and_run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 1?\n/exit\n"))
    assert cli.main([name, *arguments]) == 0
    assert told


def read(options: argparse.Namespace) -> tuple[str, ...]:
    """As the command would before its work; returns the command and its config's name.

    Raises FasttuneError for what is wrong.
    """
    if options.command == "eval":
        for model in [options.model, *options.others]:
            evaluate.choose(options.tasks, options.data, trained_model.open_run(model))
    if not getattr(options, "config", None):
        return (options.command,)
    loaded = config.load(options.config, options.overrides)
    if options.command == "bench":
        assert bench.checked_arms(loaded, options.arms, options.repeats, options.steps)
    return options.command, loaded.name


def why_only_read(options: argparse.Namespace) -> str | None:
    """Why a command is not run here; None: it is."""
    train, tasks = options.command == "train", getattr(options, "tasks", None)
    loaded = config.load(options.config, options.overrides) if train and options.config else None
    reasons = {
        "minutes, a process for each arm and repeat: tests/test_bench.py": options.command == "bench",
        "a process for each run: tests/test_compare.py": bool(getattr(options, "others", None)),
        "its problems are not here: tests/test_eval_tasks.py": tasks not in (None, "builtin:arithmetic"),
        "several processes: tests/test_launch.py": train and options.gpus and not options.print_launch,
        "its weights are not here": loaded and not loaded.model.name.startswith("builtin:"),
        "its rows are not here": loaded and loaded.data.train == "openai/gsm8k:main",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def make_small(options: argparse.Namespace) -> None:
    """The same command on a tiny model, with few rows and short answers."""
    if options.command == "tokenize" and options.config == "CONFIG":
        options.config = "configs/smollm2_135m_cpt.yaml"  # any of plain text
    if "out" in options and (out := Path(options.out or "config.yaml")).is_symlink():
        out.unlink()  # what `place` has under that name
    if getattr(options, "config", None):
        name = config.load(options.config, options.overrides).name
        options.overrides = [*options.overrides, *SMALL[name]]
    if getattr(options, "gpu", None) == "GPU":
        options.gpu = "h100-80"
    if getattr(options, "model", None) == "builtin:smollm2-135m":
        options.model = "builtin:tiny"
    for setting, value in {"limit": 1, "max_new_tokens": 4}.items():
        if setting in options:
            setattr(options, setting, value)


@pytest.mark.parametrize("command", SCRIPTS, ids=str)
def test_a_script_is_there_and_has_the_options(command: Command) -> None:
    program, *words = command.words
    script = program if program == "pytest" else words.pop(0)
    if script == "-m":
        module = words.pop(0)
        assert module in ("fasttune.verify", "pip", "ipykernel")
        if module == "fasttune.verify":
            verify.parser().parse_args(words)
        return
    assert script == "pytest" or (ROOT / script).is_file()
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        assert option in options_of(script), f"{script} has no {option}"


@cache
def options_of(script: str) -> str:
    """A text with the options that it takes: its --help, or itself where it knows no --help."""
    if script in ("pytest", "scripts/test.sh", "scripts/nightly.sh"):  # they hand their arguments on
        return options_of_pytest()
    if script.endswith(".py") and "argparse" not in (ROOT / script).read_text():
        return (ROOT / script).read_text().split('"""', 2)[2]  # what it does, not what it says
    command = ["bash" if script.endswith(".sh") else sys.executable, script, "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@cache
def options_of_pytest() -> str:
    command = [sys.executable, "-m", "pytest", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_other_program_is_known() -> None:
    others = {command.words[0] for command in COMMANDS} - {"fasttune", "bash", "python", "pytest"}
    assert others == set(NOT_OURS)


@pytest.mark.parametrize(("text", "where"), documented.settings())
def test_a_setting_is_one_word_of_a_shell_and_is_known(text: str, where: str) -> None:
    """Pasted behind a config it reaches the command as it stands: `data.columns={a: b}` without quotes does not."""
    (words,) = documented.heard(f"fasttune train CONFIG {text}", where)
    assert len(words) == 4, f"{where}: a shell makes {words[3:]} of {text}; put it in quotes"
    assert words[3].partition("=")[0] in config.known_keys(), f"{where}: {text}"
