"""Completion, asked by bash itself; what zsh and fish ask is the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import cli, config
from fasttune.tools import completion
from fasttune.verify import main as verify

FASTTUNE = Path(sys.executable).with_name("fasttune")
ASK = """
eval "$("$1" completion bash)"
complete -p fasttune
for COMP_LINE in "${@:2}"; do
    COMP_POINT=${#COMP_LINE} COMPREPLY=()
    _fasttune 2>/dev/null  # compopt works only while a person types
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_settings_values_and_names(tmp_path: Path) -> None:
    """What stands before the last = or : is there already, since bash cuts words at them."""
    asked = {
        f"{FASTTUNE} tr": "train",
        f"{FASTTUNE} train c.yaml train.le": "train.learning_rate=",
        f"{FASTTUNE} train c.yaml train.max_steps=2 train.scheduler=co": "constant cosine",
        f"{FASTTUNE} train c.yaml name=a:b=c train.scheduler=w": "wsd",
        f"{FASTTUNE} init quick": "quickstart",
        f"{FASTTUNE} train --gpus 2 --print-l": "--print-launch",
        f"{FASTTUNE} merge runs/x --dtype ": "bf16 fp16 fp32",
        f"{FASTTUNE} merge runs/x --dtype=bf": "bf16",
        f"{FASTTUNE} train c": "",
        f"{FASTTUNE} train 'c": "",
    }
    command = ["bash", "--norc", "-c", ASK, "bash", str(FASTTUNE), *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    registered, *told = done.stdout.splitlines()
    assert registered == "complete -o default -F _fasttune fasttune", "files where nothing else is known"
    assert dict(zip(asked, told, strict=True)) == asked


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["plan", "c.yaml", "lora.rs"], ["lora.rslora="]),
        (["plan", "c.yaml", "lora.rslora="], ["lora.rslora=false", "lora.rslora=true"]),
        (["data", "c.yaml", "nowhere.x="], []),
        (["data", "c.yaml", "seed"], ["seed="]),
        (["data", "c.yaml", "model.name=built"], []),
        (["generate", "runs/x", "train.le"], []),
        (["train", "--pri"], ["--print-launch"]),
        (["merge", "runs/x", "--dtype=f"], ["--dtype=fp16", "--dtype=fp32"]),
        (["merge", "runs/x", "--nowhere="], []),
        (["init", "quickstart", "q"], []),
        (["verify", "--o"], ["--online"]),
        (["completion", "f"], ["fish"]),
        (["--v"], ["--version"]),
        (["nowhere", "x"], []),
    ],
)
def test_what_a_word_may_become(line: list[str], found: list[str]) -> None:
    assert completion.candidates(line, cli.parser()) == found


def test_everything_can_be_completed() -> None:
    parser = cli.parser()
    assert completion.candidates(["bench", "c.yaml", ""], parser) == sorted(f"{key}=" for key in config.known_keys())
    commands = completion.candidates([""], parser)
    assert {"train", "verify", "init", "completion"} <= set(commands)
    own = {text for action in verify.parser()._actions for text in action.option_strings}
    assert set(completion.OPTIONS_OF_VERIFY) | {"--help", "-h"} == own


def test_a_shell_asks_without_anything_heavy() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "fasttune.cli", "completion", "words", "train", "x", "train."]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "train.learning_rate=" in done.stdout.split()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"pydantic", "yaml", "rich", "torch"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_first_line_says_where_it_goes(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.startswith(f"# {shell}: put  ") and f"fasttune completion {shell}" in script.splitlines()[0]
