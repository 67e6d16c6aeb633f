"""`from fasttune import train, load_config`: what a notebook does."""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fasttune
from fasttune import api, config
from fasttune.errors import ConfigError, FasttuneError, OutputError, RunFailed

TINY = """
model: {name: builtin:tiny, max_length: 256}
data: {train: builtin:arithmetic, max_rows: 16}
lora: {rank: 4}
train: {batch_rows: 8}
"""
NOTEBOOK = """
import io, json, sys
import fasttune
light = "pydantic" not in sys.modules
from fasttune import load_config, train
light = light and "torch" not in sys.modules
sys.stderr = io.StringIO()  # a kernel's is no file either
exec(sys.argv[1])
shown, again = sys.stderr.getvalue(), train(load_config("config.yaml", "train.max_steps=1"), quiet=True)
quiet = sys.stderr.getvalue() == shown
try:
    train(config)
except fasttune.errors.OutputError as error:
    taken = str(error)
print(json.dumps([light, quiet, shown, result.status, result.steps, result.output_dir, again.steps, taken]))
"""


@pytest.mark.slow  # a fresh interpreter imports everything
def test_a_notebook_trains(tmp_path: Path) -> None:
    """The code of docs/python.md, as it stands."""
    (tmp_path / "config.yaml").write_text(TINY)
    page = Path("docs/python.md").read_text().partition("```python\n")[2].partition("```")[0]
    command = [sys.executable, "-c", NOTEBOOK, page]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    printed, last = done.stdout.splitlines()
    light, quiet, shown, status, steps, folder, again, taken = json.loads(last)
    assert light, "fasttune imports nothing heavy, load_config no torch"
    assert (status, steps, folder, again) == ("completed", 20, "runs/first", 1) and printed.startswith("completed ")
    assert "builtin:tiny" in shown and quiet
    assert json.loads((tmp_path / folder / "run.json").read_text())["steps"] == 20
    assert "output_dir: runs/first already holds a run" in taken


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs end at once, as `status` says; `asked` is what they were given."""
    from fasttune import terminal
    from fasttune.core import train as training

    made = SimpleNamespace(status="completed", error=None, output_dir="runs/x", asked=None)

    def run(settings: config.Config, reporter: Any, resume: Path | None, **_: Any) -> Any:
        made.asked = settings, resume
        return made

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(terminal.Reporter, "finish", lambda self, result: None)
    return made


@pytest.fixture
def tiny(tmp_path: Path) -> config.Config:
    (tmp_path / "c.yaml").write_text(TINY)
    return fasttune.load_config(tmp_path / "c.yaml", f"output_dir={tmp_path / 'run'}")


def test_a_run_that_fails_raises_and_one_that_is_interrupted_is_returned(ended: Any, tiny: config.Config) -> None:
    ended.status, ended.error = "failed", "out of memory"
    with pytest.raises(RunFailed, match="runs/x: out of memory"):
        fasttune.train(tiny)
    ended.status = "interrupted"
    assert fasttune.train(tiny).status == "interrupted"


def test_a_run_is_resumed(ended: Any, tiny: config.Config, tmp_path: Path) -> None:
    fasttune.train(tiny)
    assert ended.asked == (tiny, None)
    (tmp_path / "run").mkdir()
    for resume in (True, tmp_path / "run"):
        fasttune.train(tiny, resume=resume)
        assert ended.asked == (tiny, tmp_path / "run")
    with pytest.raises(OutputError, match="a run is resumed in its own folder"):
        fasttune.train(tiny, resume=tmp_path)


@pytest.mark.parametrize("first", ["transformers", "peft"])
def test_what_unsloth_patches_must_not_come_first(
    first: str, ended: Any, tiny: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unsloth", *api.PATCHED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    fasttune.train(tiny)  # no warning: warnings are errors here
    monkeypatch.setitem(sys.modules, first, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=f"^{first} imported before .*restart the kernel"):
        fasttune.train(tiny)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())  # type: ignore[arg-type]
    fasttune.train(tiny)


def test_what_cannot_train_is_said(ended: Any, tiny: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"did you mean train.batch_rows\?"):
        fasttune.load_config(Path("configs/quickstart.yaml"), "train.batch_size=3")
    with pytest.raises(TypeError, match="give it load_config"):
        fasttune.train("configs/quickstart.yaml")  # type: ignore[arg-type]
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            fasttune.train(tiny)
        except FasttuneError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 2)
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
        stack.enter_context(pytest.raises(FasttuneError, match="uses 2 GPUs already"))
        fasttune.train(tiny)
    assert ended.asked is None
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        fasttune.tarin  # type: ignore[attr-defined]  # noqa: B018
