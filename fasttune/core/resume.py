"""With --resume: which checkpoint a run resumes from, and the trainer put where it left off. Loaded only then."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttune.core import model as models  # first: it imports unsloth

import numpy as np
import pydantic
import torch
import transformers

from fasttune.core import checkpoint as checkpoints
from fasttune.core.checkpoint import WHOLE, Checkpoint, trained
from fasttune.core.what_ran import MOMENTS
from fasttune.errors import OutputError, RunFailed, kind_and_line
from fasttune.metrics import Evaluation

if TYPE_CHECKING:
    from fasttune.core.trainer import MeasuredTrainer


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


def find(run: Path, model: Any, identity: dict[str, str], note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of `run` that holds, or None where there is none at all; says which, and why not others.

    Raises OutputError if none holds, or if it belongs to another model, rows or settings. Under the run's lock.
    """
    found, skipped = checkpoints.newest(run, lambda found: misfit(found, model, identity))
    for reason in skipped:
        note(f"skipped {reason}")
    if found is None and skipped:
        raise OutputError(f"--resume: no checkpoint of {run} holds ({'; '.join(skipped)}); start over: overwrite=true")
    if found is None:
        note(f"{run} has no checkpoint yet: beginning with step 1")
        return None
    then = found.state["identity"]
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
    if identity is not None and state.identity != identity:
        return None
    if identity is not None and not 0 < state.step <= int(identity[WHOLE]):
        return f"state.json: step {state.step} is none of this run"
    now, saved = trained(model), checkpoint.tensors["weights"]
    for name in {**now, **saved}:
        here, there = (_kind(found[name]) if name in found else "not there" for found in (now, saved))
        if here != there:  # copied all the same, a row would fill a whole matrix
            return f"weights.safetensors: {name} is {there}, not {here}"
    return None


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape))}"


class Resumed(transformers.TrainerCallback):
    """Puts a new trainer where a checkpoint left off: optimizer and counters at once, random states at its step."""

    def __init__(self, trainer: "MeasuredTrainer", checkpoint: Checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint
        self.done = checkpoint.state["step"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restored(lambda: restore_optimizer(self.trainer, self.checkpoint))
        models.begin_after(self.trainer, state, self.done)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.done:  # not before: beginning to load data draws random numbers too
            self._restored(lambda: restore_random(self.checkpoint))

    def _restored(self, restore: Callable[[], None]) -> None:
        try:
            restore()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, AssertionError) as error:
            raise RunFailed(
                f"{self.checkpoint.path} cannot be resumed from ({kind_and_line(error)}); "
                "remove it, and --resume takes the one before it"
            ) from error


def restore_weights(model: Any, checkpoint: Checkpoint) -> None:
    """The trained parameters as they were. The checkpoint gives them away: a second copy would fill the host."""
    now, saved = trained(model), checkpoint.tensors.pop("weights")
    with torch.no_grad():
        for name, parameter in now.items():
            parameter.copy_(saved[name])


def restore_optimizer(trainer: Any, checkpoint: Checkpoint) -> None:
    """Optimizer and scheduler as they were. The checkpoint gives the moments away, as it does the weights."""
    saved, scheduler = checkpoint.state["optimizer"], checkpoint.state["scheduler"]
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*checkpoint.tensors.pop("optimizer").items(), *saved["plain"].items()]:
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    for index, values in entries.items():
        _put_together(values, parameters[index])
        for key in MOMENTS & set(values):
            if values[key].shape != parameters[index].shape:
                raise ValueError(f"{index}.{key} has another shape than its parameter")
    if torch.is_tensor(trainer.optimizer.param_groups[0]["lr"]):
        for group in saved["groups"]:
            group |= {key: torch.tensor(group[key]) for key in ("lr", "initial_lr")}
        scheduler |= {key: [torch.tensor(rate) for rate in scheduler[key]] for key in ("base_lrs", "_last_lr")}
    trainer.optimizer.load_state_dict({"state": entries, "param_groups": saved["groups"]})
    trainer.lr_scheduler.load_state_dict(scheduler)


def _put_together(entries: dict[str, Any], parameter: torch.Tensor) -> None:
    """What checkpoint.flat has taken apart of torchao's moments."""
    for name in {key.partition(":")[0] for key in entries if ":" in key}:
        from torchao.optim.subclass_8bit import OptimState8bit

        parts = {part: entries.pop(f"{name}:{part}").to(parameter.device) for part in OptimState8bit.tensor_attrs}
        entries[name] = OptimState8bit(**parts, signed=name == "exp_avg", dtype=parameter.dtype)


def restore_random(checkpoint: Checkpoint) -> None:
    """Python's, numpy's, torch's and every GPU's generator as they were."""
    values, tensors = checkpoint.state["random"], checkpoint.tensors["random"]
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = values["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:  # the machine may have had fewer
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
