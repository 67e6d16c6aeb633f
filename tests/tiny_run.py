"""A run of eight steps on the tiny model that can be broken off, for the tests of what survives."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttune import config, plots
from fasttune.core.ranks import ALONE, Ranks
from fasttune.tools import card, estimate

STEPS = 8
TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 256},
    "data": {"train": "builtin:arithmetic", "max_rows": 24},  # 3 steps an epoch
    "lora": {"rank": 4, "alpha": 8},
    "train": {"batch_rows": 8, "max_steps": STEPS, "learning_rate": 1e-2},
    "checkpoint": {"every": "2 steps"},
}


class Reporter:
    """Remembers what it is told, and does something after a step."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        self.told: list[str] = []
        self.after = after

    def note(self, text: str) -> None:
        self.told.append(text)

    warn = note

    def step(self, step: Any) -> None:
        self.after(step.step)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


def settings(folder: Path, changes: dict[str, Any] | None = None) -> config.Config:
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TREE.items()}
    for section, values in (changes or {}).items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    if tree["train"].get("method") == "full":
        del tree["lora"]
    return config.parse(tree | {"output_dir": str(folder)})


def run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    resume: bool = False,
    diverges: bool = False,
    ranks: Ranks = ALONE,
    **reporter: Any,
) -> Any:
    """As `fasttune train` runs it, but nothing is drawn: that takes a fifth of the time. `diverges`: at a learning rate
    that no config may ask for.
    """
    from fasttune.core import train, trainer

    build, told = trainer.build, Reporter(**reporter)

    def diverging(*arguments: Any, **keywords: Any) -> Any:
        made = build(*arguments, **keywords)
        made.args.learning_rate = 1e30
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "line_plot", lambda *_, **__: "<svg/>")
        if diverges:
            patch.setattr(trainer, "build", diverging)
        settled = settings(folder, changes)
        result = train.run(settled, told, folder if resume else None, estimate.add_to, card.of_run, ranks)
    result.told = told.told
    return result


def break_off_after(step: int) -> Callable[[int], None]:
    def end(now: int) -> None:
        if now == step:
            raise RuntimeError("the machine is gone")

    return end


def learned(folder: Path) -> dict[str, bytes]:
    """The bytes of what the run saved."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*"))


def whole_and_copy(folder: Path, step: int, changes: dict[str, Any] | None = None) -> Path:
    """Run in `folder`; it is copied after this step, as it would be left by a kill, to `copy` beside it."""

    def copy(now: int) -> None:
        if now == step:
            shutil.copytree(folder, folder.with_name("copy"))

    result = run(folder, changes, after=copy)
    assert result.status == "completed" and result.resumed_from_step is None
    return folder
