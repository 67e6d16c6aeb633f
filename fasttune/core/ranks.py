"""What a process of a run tells the others, and asks them: here it is the only one. Several are in distributed.py.

JSON: plain values only.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Ranks:
    """rank: of `size` processes; local: of the `local_size` on this machine, which is number `node`."""

    rank = local = node = 0
    size = local_size = 1
    restarts = most_restarts = 0  # how often torchrun has started them again, and may
    alone = True

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

    def part(self, error: str) -> str:
        """After a failure: this process goes on alone, and the others are told why. Returns whose failure it was."""
        return error


ALONE = Ranks()


def of_environment() -> Ranks:
    """As torchrun's environment says. Raises FasttuneError where a part of it is missing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    from fasttune.core import distributed

    return distributed.of_environment()
