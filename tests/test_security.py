"""Secrets stay in the environment, a hub that does not answer is asked again, and text from data stays text."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttune import pretrained
from fasttune.config import ModelConfig
from fasttune.errors import ModelError

CANARY = "hf_canary0123456789abcdefghijklmnop"
TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 256},
    "data": {"train": "builtin:arithmetic", "max_rows": 16},
    "train": {"batch_rows": 8, "max_steps": 2},
    "checkpoint": {"every": "1 steps"},
}
ENDINGS: dict[str, tuple[list[str], int]] = {
    "completed": ([], 0),
    "failed": (["train.learning_rate=1e30", "train.max_grad_norm=1e30", "train.max_bad_steps=0"], 1),
    "no such model": (["model.name=nobody/nothing"], 2),
    "no such data": (["data.train=nobody/nothing"], 2),
    "with a traceback": (["--debug", "model.name=nobody/nothing"], 1),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_tokens_appear_nowhere(tmp_path: Path, ending: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TREE))
    settings, code = ENDINGS[ending]
    command = [sys.executable, "-m", "fasttune.cli", "train", "run.yaml", f"output_dir={tmp_path}/out", *settings]
    secrets = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY, "WANDB_API_KEY": CANARY}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=os.environ | secrets, check=False)
    assert done.returncode == code, done.stderr.decode()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "out" / "library.log" in written) == (code < 2 and ending != "with a traceback")
    for where, text in {"stdout": done.stdout, "stderr": done.stderr, **written}.items():
        assert CANARY.encode() not in text, where


class ReadTimeout(Exception):
    """As httpx and requests name theirs."""


def test_a_hub_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(pretrained.time, "sleep", pauses.append)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = 0

    def ask() -> str:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise OSError("We couldn't connect") from ReadTimeout()
        return "found"

    assert pretrained.patiently(ask) == "found"
    assert pauses == [2, 5] and "asking again in 5 s" in capsys.readouterr().out

    def never() -> str:
        raise OSError("We couldn't connect") from ReadTimeout()

    pauses.clear()
    with pytest.raises(OSError, match="couldn't connect"):
        pretrained.patiently(never)
    assert pauses == list(pretrained.PAUSES_S)
    pauses.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="couldn't connect"):
        pretrained.patiently(never)
    assert pauses == []


@pytest.mark.parametrize("status", [401, 404, 503])
def test_only_a_passing_fault_is_worth_another_try(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(pretrained.time, "sleep", pauses.append)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Refused(OSError):
        response = type("Response", (), {"status_code": status})

    def ask() -> str:
        raise Refused(f"{status} Client Error")

    with pytest.raises(Refused):
        pretrained.patiently(ask)
    assert bool(pauses) == (status == 503)


def test_a_gated_model_says_where_and_how() -> None:
    error = pretrained.explain("meta-llama/Llama-3.1-8B-Instruct", OSError("401 Client Error: gated repo"))
    assert isinstance(error, ModelError)
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct" in str(error) and "hf auth login" in str(error)


def test_code_of_a_model_is_not_run_unless_asked_for() -> None:
    assert ModelConfig(name="x").trust_remote_code is False
