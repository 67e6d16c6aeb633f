"""train.early_stopping_patience: when a run ends, what it says and saves; a kill or a signal changes nothing of it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import break_off_after, learned, run, settings

from fasttune.config import parse
from fasttune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("unsloth")

LOSSES = [9.0, 4.0, 3.0, 3.5, 3.2, 1.0, 1.0, 1.0, 1.0]  # before the first step, and after each
CHANGES: dict[str, Any] = {
    "data": {"eval": "builtin:arithmetic"},
    "eval": {"every": "1 steps", "rows": 2, "keep_best": True},
    "train": {"early_stopping_patience": 2},
    "checkpoint": {"every": "1 steps"},
}


@pytest.fixture(autouse=True)
def held_out_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of LOSSES, whatever the model has learned."""
    from fasttune.core import evaluation

    measure = evaluation.Validator.measure

    def scripted(self: Any, step: int, *progress: Any) -> Any:
        self._sums_of = lambda *_: np.array([[LOSSES[step] * 10, 5.0, 10.0]])
        return measure(self, step, *progress)

    monkeypatch.setattr(evaluation.Validator, "measure", scripted)


def told(folder: Path) -> tuple[Any, ...]:
    found = json.loads((folder / "run.json").read_text())
    seen = [json.loads(line)["eval_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("status", "steps", "error", "ended_early")
    return (*(found[name] for name in names), found["held_out"]["saved_step"], seen)


@pytest.fixture(scope="module")
def whole(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


def test_it_ends_after_so_many_evaluations_and_saves_the_best(whole: Path) -> None:
    run(whole, CHANGES)
    why = (
        "no held-out loss below 3 (step 2) in 2 evaluations (train.early_stopping_patience): ended after step 4 of 8; "
        "its learning rate had not fallen to the end"
    )
    assert told(whole) == ("completed", 4, None, why, 2, LOSSES[1:5])
    assert why in (whole / "report.html").read_text()
    assert not (whole / "checkpoints" / "step-4").exists(), "a run that is completed is not resumed"


@pytest.mark.parametrize("killed_after", [3, 4])
def test_the_count_survives_a_kill(whole: Path, tmp_path: Path, killed_after: int) -> None:
    run(tmp_path / "run", CHANGES, after=break_off_after(killed_after))
    run(tmp_path / "run", CHANGES, resume=True)
    assert (told(tmp_path / "run"), learned(tmp_path / "run")) == (told(whole), learned(whole))


def test_what_a_signal_left_out_is_measured_when_it_is_resumed(whole: Path, tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    first = run(tmp_path / "run", CHANGES, after=stop)
    assert (first.status, first.steps, first.held_out.after.step, first.ended_early) == ("interrupted", 3, 2, None)
    run(tmp_path / "run", CHANGES, resume=True)
    assert (told(tmp_path / "run"), learned(tmp_path / "run")) == (told(whole), learned(whole))


def test_it_may_run_to_its_end(tmp_path: Path) -> None:
    result = run(tmp_path / "run", CHANGES | {"train": {"early_stopping_patience": 2, "max_steps": 4}})
    assert (result.status, result.steps, result.ended_early) == ("completed", 4, None)


def test_it_needs_evaluations_on_the_way(tmp_path: Path) -> None:
    tree = settings(tmp_path).model_dump(exclude_unset=True)
    tree["train"]["early_stopping_patience"] = 2
    with pytest.raises(ConfigError, match="early_stopping_patience counts evaluations: set eval.every"):
        parse(tree)
    with pytest.raises(ConfigError, match="eval.every needs held-out rows"):
        parse(tree | {"eval": {"every": "2 steps"}})
