"""The state of a training as tensors and plain values, and back: what a checkpoint holds, and what it belongs to.

Weights that are trained, optimizer, scheduler and every random state. The position in the data is the step alone.
"""

import random
import zlib
from dataclasses import dataclass, field
from typing import Any

from fasttune.core import model as fasttune_model  # noqa: F401  first: it imports unsloth

import numpy as np
import pydantic
import torch

from fasttune.core.checkpoint import Checkpoint, Tensors
from fasttune.metrics import Evaluation
from fasttune.core.prepare import Job

# What may differ between a checkpoint and the run that goes on from it: how a step is computed, not what it learns.
# The length of the run and the model are compared as what they came to: steps, and a probe of the weights.
FREE = {
    "model.name",
    "model.revision",
    "train.epochs",
    "train.gradient_checkpointing",
    "train.max_bad_steps",
    "train.max_steps",
    "train.micro_batch_rows",
    "train.packing",
    "train.report_to",
}
SECTIONS = ("seed", "model", "lora", "train")
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}  # of torch's AdamW, and of bitsandbytes'
WHOLE = "steps of the whole run"
PROBED = 256  # values of every parameter that tell whether the base model is the same


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


def collect(trainer: Any) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """(tensors by file, plain values) of a trainer between two steps; after the last one without the moments."""
    tensors: dict[str, Tensors] = {"weights": trained(trainer.model), "optimizer": {}, "random": _random_tensors()}
    optimizer = trainer.optimizer.state_dict()
    if trainer.state.global_step == trainer.state.max_steps:
        optimizer["state"] = {}
    plain: dict[str, Any] = {}
    for index, entries in optimizer["state"].items():
        for name, value in _flat(entries).items():
            (tensors["optimizer"] if torch.is_tensor(value) else plain)[f"{index}.{name}"] = value
    state = {
        "step": trainer.state.global_step,
        "optimizer": {"groups": optimizer["param_groups"], "plain": plain},
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": _random_values(),
    }
    return tensors, state


def _flat(entries: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes' 8-bit optimizers keep a dict in the state of a parameter, and load it as well without."""
    found: dict[str, Any] = {}
    for name, value in entries.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def misfit(checkpoint: Checkpoint, model: Any, identity: dict[str, str] | None = None) -> str | None:
    """Why a run cannot go on from a checkpoint whose files hold, or None.

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


def restore_weights(model: Any, checkpoint: Checkpoint) -> None:
    """The trained parameters as they were. The checkpoint gives them away: a second copy would fill the host."""
    now, saved = trained(model), checkpoint.tensors.pop("weights")
    with torch.no_grad():
        for name, parameter in now.items():
            parameter.copy_(saved[name])


def restore_optimizer(trainer: Any, checkpoint: Checkpoint) -> None:
    """Optimizer and scheduler as they were. The checkpoint gives the moments away, as it does the weights."""
    saved = checkpoint.state["optimizer"]
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*checkpoint.tensors.pop("optimizer").items(), *saved["plain"].items()]:
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    for index, values in entries.items():
        for key in MOMENTS & set(values):
            if values[key].shape != parameters[index].shape:
                raise ValueError(f"{index}.{key} has another shape than its parameter")
    trainer.optimizer.load_state_dict({"state": entries, "param_groups": saved["groups"]})
    trainer.lr_scheduler.load_state_dict(checkpoint.state["scheduler"])


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


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def identity(job: Job) -> dict[str, str]:
    """What a checkpoint belongs to; one made for something else cannot be gone on from. Before the first step only.

    Settings that change what is learned, the rows themselves, and a probe of every weight.
    """
    found: dict[str, str] = {}
    settings = job.config.model_dump(mode="json")
    for section in SECTIONS:
        values = settings[section] if isinstance(settings[section], dict) else {"": settings[section]}
        found |= {f"{section}.{key}".rstrip("."): str(value) for key, value in values.items()}
    found = {key: value for key, value in found.items() if key not in FREE}
    found[WHOLE] = str(job.total_steps)
    found["data.eval_share"] = str(job.config.data.eval_share)
    for number, (rows, weight) in enumerate(zip(job.data.parts, job.data.weights, strict=True), 1):
        found[f"rows of data set {number}"] = f"{len(rows)} rows × {weight:g} ({rows.checksum})"
    found["weights of the base model"] = _probe(job.model)
    return found


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Sentences, one for each thing that is not what it was."""
    return [f"{key} was {then.get(key)}, is {now.get(key)}" for key in {**then, **now} if then.get(key) != now.get(key)]


def _probe(model: Any) -> str:
    check = 0
    for parameter in model.parameters():
        values = parameter.detach().flatten()[:PROBED].cpu().contiguous()
        check = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), check)
    return f"{check:08x}"


def _random_values() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    keys = np.asarray(keys)
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _random_tensors() -> Tensors:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state()} | {f"cuda.{i}": state for i, state in enumerate(cuda)}
