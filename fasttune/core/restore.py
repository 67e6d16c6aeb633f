"""A run put back where a checkpoint left off: weights, optimizer, scheduler, random states.

Loaded only with --resume and for eval.keep_best.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fasttune.core import model as models  # first: it imports unsloth

import numpy as np
import torch
import transformers

from fasttune.core.checkpoint import trained
from fasttune.core.ranks import ALONE, Ranks
from fasttune.core.resume import Checkpoint
from fasttune.core.what_ran import MOMENTS
from fasttune.errors import RunFailed, kind_and_line

if TYPE_CHECKING:
    from fasttune.core.trainer import MeasuredTrainer


def into(trainer: "MeasuredTrainer", checkpoint: Checkpoint) -> None:
    """Weights now, the rest when the trainer begins. The checkpoint gives its tensors away."""
    restore_weights(trainer.model, checkpoint, trainer.ranks)
    trainer.add_callback(Resumed(trainer, checkpoint))


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


def restore_weights(model: Any, checkpoint: Checkpoint, ranks: Ranks = ALONE) -> None:
    """The trained parameters as they were. The checkpoint gives them away: a second copy would fill the host."""
    now, saved = trained(model), checkpoint.tensors.pop("weights")
    with torch.no_grad():
        for name, parameter in now.items():
            parameter.copy_(ranks.part_of(saved[name], parameter))


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
            values[key] = trainer.ranks.part_of(values[key], parameters[index])
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
