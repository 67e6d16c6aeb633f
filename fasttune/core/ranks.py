"""What a process of a run tells the others, and asks them: here it is the only one. Several are in distributed.py.

JSON: plain values only.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from fasttune.config import Config
from fasttune.errors import FasttuneError

if TYPE_CHECKING:
    import torch


class Ranks:
    """rank: of `size` processes; local: of the `local_size` on this machine, which is number `node`."""

    rank = local = node = 0
    size = local_size = 1
    restarts = most_restarts = 0  # how often torchrun has started them again, and may
    alone = True
    parts = 1  # processes that one copy of the weights is divided among (core/sharded.py)

    def check(self, config: Config) -> None:
        """Raise FasttuneError for settings that do not work with a divided model."""

    def connect(self) -> None:
        """Meet the other processes, before Unsloth's import."""

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank, however long rank 0 takes; JSON."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, however long they take; JSON."""
        return [value]

    def check_same(self, found: dict[str, str]) -> None:
        """Raise RunFailed unless every rank has the same values."""

    def node_first(self) -> AbstractContextManager[None]:
        """One process of each machine first: what it downloads or makes is there when the others come."""
        return nullcontext()

    def everyone(self, values: Sequence[float], doing: str) -> list[list[float]]:
        """The values of every rank, by rank. Raises RunFailed, naming who is missing, when one does not come."""
        return [list(values)]

    def total(self, values: Sequence[float], doing: str) -> list[float]:
        """The sum over all ranks of each value."""
        return [sum(column) for column in zip(*self.everyone(values, doing), strict=True)]

    def begins(self, doing: str) -> None:
        """What this rank does from now on, for the message of one that waits for it."""

    def add_gradients(self, parameters: "Iterable[torch.nn.Parameter]") -> None:
        """Replace each gradient by its sum over the ranks; one that is missing counts as zeros."""

    def copy_from_first(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Give every rank the values of rank 0's."""

    # -- a model that is divided among the processes; of any other one these do nothing

    def loading(self) -> AbstractContextManager[Any]:
        """Around the loading of a model, of which each process reads its part."""
        return self.node_first()

    def divide(self, model: Any) -> Any:
        """The loaded model, of which this process holds a part."""
        return model

    def apart(self, model: Any) -> None:
        """Take its layers apart again behind a forward that has no backward: an optimizer updates parts."""

    def gathered(self, model: Any, trained_only: bool) -> AbstractContextManager[Any]:
        """Meanwhile the weights are whole on rank 0; every process must take part."""
        return nullcontext()

    def whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The same, each tensor whole, on rank 0's host; every process must take part, and gets what is not divided."""
        return dict(tensors)

    def one_by_one(self, tensors: "Iterable[torch.Tensor]") -> "Iterator[torch.Tensor]":
        """Each whole, on every process, for as long as it is looked at; every process must take part."""
        return iter(tensors)

    def part_of(self, whole: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
        """What this process holds of a tensor that is divided as `like` is."""
        return whole

    def held(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The values that this process holds."""
        return tensor

    def share(self, things: Sequence[Any]) -> Sequence[Any]:
        """Those of `things` that this process computes."""
        return things[self.rank :: self.size]

    def sum_of_shares(self, values: list[float], doing: str) -> list[float]:
        """Of all `things`, where `values` are of this process's share."""
        return self.total(values, doing)

    def any_of(self, found: bool, doing: str) -> bool:
        """Whether it was found in the gradients, which every process has whole unless the model is divided."""
        return found

    def part(self, error: str) -> str:
        """After a failure: this process goes on alone, and the others are told why. Returns whose failure it was."""
        return error


ALONE = Ranks()
DIVIDED = "UNSLOTH_FSDP2"


def divided_is_asked_for() -> bool:
    return os.environ.get(DIVIDED, "0") not in ("", "0")


def preflight(config: Config) -> None:
    """Before processes are started. Raises FasttuneError for settings that do not work with a divided model."""
    if divided_is_asked_for():
        from fasttune.core import sharded

        sharded.check(config)


def of_environment() -> Ranks:
    """As torchrun's environment says. Raises FasttuneError where a part of it is missing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if divided_is_asked_for():
            raise FasttuneError(f"{DIVIDED} divides a model among processes, here is one: add --gpus N, or unset it")
        return ALONE
    from fasttune.core import distributed

    return distributed.of_environment()
