"""What a run is resumed from: which run --resume means, which of its checkpoints holds, and the steps before it.

A checkpoint may come from another machine or be damaged: its files are checked before anything of it is used
(restore.py uses it).
"""

import json
import math
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from fasttune import system
from fasttune.config import Config
from fasttune.core.checkpoint import ADDED, MANIFEST, STATE, WHOLE, Tensors, sha256, steps, trained
from fasttune.core.run_folder import METRICS
from fasttune.errors import OutputError
from fasttune.metrics import Evaluation, StepMetrics

if TYPE_CHECKING:
    import torch


def to_resume(config: Config, named: str) -> Path:
    """The folder of the run that --resume means: `named`, else the config's, else the newest of this name in runs/.

    Raises OutputError.
    """
    own = Path(config.output_dir).expanduser() if config.output_dir else None
    if named:
        folder = Path(named).expanduser()
        if own is not None and own.absolute() != folder.absolute():
            raise OutputError(f"--resume {named}: a run is resumed in its own folder; leave output_dir={own} out")
        if not folder.is_dir():
            raise OutputError(f"--resume {named}: no such folder; name that of the run to resume")
        return folder
    if own is not None:
        return own
    dated = re.compile(re.escape(config.name) + r"-(\d{8}-\d{6})(?:-(\d+))?")  # not those of another name: NAME-B-DATE
    folders = [path for path in Path("runs").glob("*/") if (path / "checkpoints").is_dir() or _is_completed(path)]
    found = [(dated.fullmatch(path.name), path) for path in folders]
    runs = sorted((match[1], int(match[2] or 1), path) for match, path in found if match)
    if not runs:
        raise OutputError(f"--resume: no runs/{config.name}-DATE has a checkpoint; name the folder of the run")
    if len(runs) > 1 and runs[-1][0] > f"{datetime.now():%Y%m%d-%H%M%S}":
        raise OutputError(
            f"--resume: {runs[-1][2]} is dated in the future, so it is not known which run is the newest: "
            "name its folder, and rename the one with the wrong date"
        )
    return runs[-1][2]


def refuse_completed(run: Path) -> None:
    """Raise OutputError if nothing of a run is left to do. Under its lock: it may be completed any moment."""
    if _is_completed(run):
        raise OutputError(f"--resume: {run} is completed, nothing is left to do; start over in another output_dir")


def _is_completed(run: Path) -> bool:
    path = run / "run.json"
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "completed"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


class Broken(Exception):
    """A checkpoint that does not hold: why, in a few words."""


@dataclass(frozen=True)
class Checkpoint:
    """One that holds. tensors: by the name of their file; state: plain values (State)."""

    path: Path
    tensors: dict[str, Tensors]
    state: dict[str, Any]


@dataclass
class Optimizer:
    groups: list[dict[str, Any]]
    plain: dict[str, Any]


@dataclass
class Random:
    python: list[Any]
    numpy: list[Any]


@dataclass
class State:
    """What a checkpoint's state.json holds. It may come from another machine, and is checked before it is used."""

    step: int
    optimizer: Optimizer
    scheduler: dict[str, Any]
    random: Random
    identity: dict[str, str]
    wall_s: float
    held_out: dict[str, Evaluation | None] = field(default_factory=dict)
    evaluations_since_best: int = 0


def find(run: Path, model: Any, identity: dict[str, str], note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of `run` that holds, or None where there is none at all; says which, and why not others.

    Raises OutputError if none holds, or if it belongs to another model, rows or settings. Under the run's lock.
    """
    found, skipped = newest(run, lambda found: misfit(found, model, identity))
    for reason in skipped:
        note(f"skipped {reason}")
    if found is None and skipped:
        raise OutputError(f"--resume: no checkpoint of {run} holds ({'; '.join(skipped)}); start over: overwrite=true")
    if found is None:
        note(f"{run} has no checkpoint yet: beginning with step 1")
        return None
    then = ADDED | found.state["identity"]
    if changed := [key for key in {**then, **identity} if then.get(key) != identity.get(key)]:
        told = "; ".join(f"{key} was {then.get(key)}, is {identity.get(key)}" for key in changed)
        raise OutputError(
            f"--resume: {found.path} belongs to another run: {told}. Set that back, or start over in another output_dir"
        )
    note(f"resuming from {found.path}, step {found.state['step']:,}")
    return found


def misfit(checkpoint: Checkpoint, model: Any, identity: dict[str, str] | None = None) -> str | None:
    """Why a run cannot resume from a checkpoint whose files hold, or None.

    One of another identity is no misfit: what differs is named to the person.
    """
    try:
        state = pydantic.TypeAdapter(State).validate_python(checkpoint.state)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return f"state.json: {'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    if checkpoint.path.name != f"step-{state.step}":
        return f"state.json is that of step {state.step}"
    if missing := {"weights", "optimizer", "random"} - set(checkpoint.tensors):
        return f"{sorted(missing)[0]}.safetensors is missing"
    if identity is not None and ADDED | state.identity != identity:
        return None
    if identity is not None and not 0 < state.step <= int(identity[WHOLE]):
        return f"state.json: step {state.step} is none of this run"
    now, saved = trained(model), checkpoint.tensors["weights"]
    for name in {**now, **saved}:
        here, there = (_kind(found[name]) if name in found else "not there" for found in (now, saved))
        if here != there:  # copied all the same, a row would fill a whole matrix
            return f"weights.safetensors: {name} is {there}, not {here}"
    return None


def _kind(tensor: "torch.Tensor") -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape))}"


def newest(
    run: Path, misfit: Callable[[Checkpoint], str | None] = lambda found: None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that holds and is no `misfit`, and why newer ones were skipped."""
    skipped: list[str] = []
    for _, path in steps(run):
        try:
            found = read(path)
            if (problem := misfit(found)) is None:
                return found, skipped
        except Broken as error:
            problem = str(error)
        skipped.append(f"{path.name}: {problem}")
    return None, skipped


def read(path: Path) -> Checkpoint:
    """A checkpoint whose files are what its manifest says. Raises Broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if problem := broken(path):
        raise Broken(problem)
    try:
        files = [path / name for name in json.loads((path / MANIFEST).read_text(encoding="utf-8"))]
        tensors = {file.stem: load_file(file) for file in files if file.suffix == ".safetensors"}
        return Checkpoint(path, tensors, json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise Broken(f"its files cannot be read ({type(error).__name__})") from error


def broken(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None if every one is what the manifest says."""
    try:
        files = json.loads(_regular(path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside of the checkpoint"
            size = _regular(path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, not {expected['bytes']:,}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} was changed after it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Broken as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if STATE in files else f"{STATE} is not in {MANIFEST}"


def _regular(path: Path) -> Path:
    if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead out of the checkpoint, and a pipe never ends
        raise Broken(f"{path.name} is a link or a pipe, not a file of the checkpoint")
    return path


def cut_off(path: Path, step: int) -> None:
    """Drop the lines of a run's file that are of later steps, or torn: they are made again."""

    def stays(line: bytes) -> bool:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            return bool(json.loads(line)["step"] <= step)
        return False

    if path.is_file():
        lines = path.read_bytes().splitlines(keepends=True)
        system.write_atomic(path, b"".join(line for line in lines if stays(line)))


def read_metrics(folder: Path, step: int, warn: Callable[[str], object]) -> list[StepMetrics]:
    """The steps of a run up to `step`, from its metrics.jsonl; a warning for those whose line cannot be read."""
    path, found = folder / METRICS, dict[int, StepMetrics]()
    form = pydantic.TypeAdapter(StepMetrics)
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # a machine that went down may have torn it
            values = json.loads(line)
            values.setdefault("computed_tokens", values["tokens"] - values.pop("shared_tokens", 0))  # before 2026-11-26
            one = form.validate_python(values | {"loss": math.nan if values["loss"] is None else values["loss"]})
            found[one.step] = one
    kept = [found[number] for number in sorted(found) if 0 < number <= step]
    if lost := step - len(kept):
        warn(
            f"{METRICS}: the lines of {lost:,} of the {step:,} steps before the checkpoint cannot be read: the weights "
            "are right, but tokens, losses and speeds of the report are without these steps"
        )
    return kept
