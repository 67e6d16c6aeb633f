"""What trackers get, read back from the files that they write; and what it costs a run when they fail."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import STEPS, break_off_after, losses, run, settings

from fasttune.core import trackers
from fasttune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("unsloth")

KEY = "canary-5bd1e995"
NOTHING_MORE = "train.report_to: nothing more is sent to tensorboard:"


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_has_every_step_once_even_of_a_resumed_run(tmp_path: Path) -> None:
    changes = {"train": {"report_to": "tensorboard"}, "data": {"eval": "builtin:arithmetic"}}
    run(tmp_path / "run", changes, after=break_off_after(5))
    assert run(tmp_path / "run", changes, resume=True).resumed_from_step == 4
    seen = scalars(tmp_path / "run", "loss")
    assert list(seen) == list(range(1, STEPS + 1))
    assert list(seen.values()) == pytest.approx(losses(tmp_path / "run"), rel=1e-6)
    assert list(scalars(tmp_path / "run", "eval_loss")) == [STEPS]
    assert set(scalars(tmp_path / "run", "tokens_per_s")) == set(seen)


@pytest.mark.nightly  # which installs it: with it trl's import takes a second longer
def test_wandb_keeps_it_here_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = run(tmp_path / "run", {"train": {"report_to": "wandb", "max_steps": 3}})
    assert (result.status, result.warnings) == ("completed", [])
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"tokens_per_s" in content and b"learning_rate" in content
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert KEY.encode() not in everything


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in with its three calls is told: the package itself needs another pillow than the pinned one."""
    told: list[Any] = []
    stand_in = SimpleNamespace(
        init=lambda **settings: told.append(settings["name"]),
        log=lambda numbers, step: told.append((step, numbers["loss"])),
        finish=lambda: told.append("finished"),
        __spec__=object(),
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    return told


def test_trackio_gets_the_same_numbers(tmp_path: Path, trackio: list[Any]) -> None:
    run(tmp_path / "run", {"train": {"report_to": "trackio", "max_steps": 2}})
    first, second = losses(tmp_path / "run")
    assert trackio == ["run", (1, first), (2, second), "finished"]


def test_several_get_the_same_numbers_and_one_that_fails_leaves_the_other(
    tmp_path: Path, trackio: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"train": {"report_to": ["tensorboard", "trackio"], "max_steps": 2}}
    run(tmp_path / "run", both)
    first, second = losses(tmp_path / "run")
    assert trackio == ["run", (1, first), (2, second), "finished"]
    assert list(scalars(tmp_path / "run", "loss").values()) == pytest.approx([first, second], rel=1e-6)
    trackio.clear()
    monkeypatch.setattr(trackers, "_tensorboard", lambda *_: 1 / 0)
    result = run(tmp_path / "run", both | {"overwrite": True})
    assert result.warnings == [
        "train.report_to: nothing more is sent to tensorboard: ZeroDivisionError: division by zero"
    ]
    assert len(trackio) == 4
    assert not (tmp_path / "run" / "tensorboard").exists(), "overwrite removes what the run before had written"


@pytest.mark.parametrize(("names", "told"), [([], "names no tracker"), (["wandb"] * 2, "names a tracker twice")])
def test_a_list_of_trackers_names_each_once(tmp_path: Path, names: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=f"train.report_to: {told}"):
        settings(tmp_path, {"train": {"report_to": names}})


def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Any, resumed_from_step: int | None) -> Any:
        def send(numbers: dict[str, float], step: int) -> None:
            raise ConnectionError("the service is down\nand more")

        return send, lambda: None

    monkeypatch.setattr(trackers, "_tensorboard", failing)
    result = run(tmp_path / "run", {"train": {"report_to": "tensorboard", "max_steps": 3}})
    assert (result.status, result.steps) == ("completed", 3)
    assert result.warnings == [
        "train.report_to: nothing more is sent to tensorboard: ConnectionError: the service is down"
    ]
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]) == 1


def test_a_missing_package_or_key_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="no key; run `wandb login`"):
        run(tmp_path / "run", {"train": {"report_to": "wandb"}})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to=tensorboard: the package is not installed; pip install"):
        run(tmp_path / "run", {"train": {"report_to": "tensorboard"}})
    assert not (tmp_path / "run").exists()
