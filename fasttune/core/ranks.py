"""The processes of one run, started by torchrun: which one this is, and what they tell each other.

Each trains as a run on one GPU does. Nothing of torchrun's environment is left for accelerate, transformers and Unsloth
to find, so none of them wraps the model or deals out the data. What the processes share is here: rows are dealt out
(data/dealing.py), gradients are summed once a step, and what all must decide alike is told to all.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from fasttune.errors import FasttuneError, RunFailed

if TYPE_CHECKING:
    import torch

# What torchrun sets: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
HIDDEN = (*LAUNCHED, "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
RESTARTS, MOST_RESTARTS = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
TIMEOUT = "FASTTUNE_RANK_TIMEOUT_S"  # seconds that a process waits for the others within a step
BUCKET_VALUES = 64 * 2**20  # gradients that are summed at once
LEAST_PAUSE_S, MOST_PAUSE_S = 0.001, 0.25


@dataclass(eq=False)
class Ranks:
    """rank: of `size` processes; local: of those on this machine, which is number `node`. Alone: 0 of 1."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    node: int = 0
    restarts: int = 0  # how often torchrun has started them again
    most_restarts: int = 0
    _turn: int = 0  # things told so far: the same on every rank
    _arrived: int = 0  # exchanges so far
    _apart: bool = False
    _store: Any = None
    _numbers: Any = None
    _gradients: Any = None

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun's environment says. Raises FasttuneError where a part of it is missing."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        missing = [name for name in LAUNCHED if name not in os.environ]
        if missing:
            raise FasttuneError(f"RANK is set, {', '.join(missing)} not: start several processes with torchrun")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        restarts = (int(os.environ.get(name, "0")) for name in (RESTARTS, MOST_RESTARTS))
        return cls(*(int(os.environ[name]) for name in names), *restarts)

    def connect(self) -> None:
        """Meet the other processes; imports torch, and must come before Unsloth's import."""
        if self.size > 1:
            from fasttune import cpu

            cpu.ask_for_huge_pages()
            import torch
            import torch.distributed as dist

            timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, "600")))
            found, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=timeout))
            self._store = dist.PrefixStore("fasttune", found)
            of = lambda name: (dist.PrefixStore(name, found), self.rank, self.size)  # noqa: E731
            # Not init_process_group: Unsloth and transformers would find it, and meet in places of their own.
            self._numbers = self._gradients = dist.ProcessGroupGloo(*of("numbers"), timeout)
            if torch.cuda.is_available():
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._gradients = dist.ProcessGroupNCCL(*of("gradients"), options)
        for name in [name for name in os.environ if name in HIDDEN or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]

    @property
    def alone(self) -> bool:
        return self.size == 1 or self._apart

    # -- what all know

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank, however long rank 0 takes; JSON."""
        return value if self.alone else self._told("agree", value, [0])[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, however long they take; JSON."""
        return [value] if self.alone else self._told("gather", value, range(self.size))

    def _told(self, what: str, value: Any, tellers: Iterable[int]) -> list[Any]:
        self._turn += 1
        key = f"{what}/{self._turn}"
        if self.rank in (ranks := list(tellers)):
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._get(f"{key}/{rank}")) for rank in ranks]

    def _get(self, key: str) -> bytes:
        """Looks again and again: a wait inside the store would hear no signal, and warn when it is long."""
        pause_s = LEAST_PAUSE_S
        while not self._store.check([key]):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)
        return bytes(self._store.get(key))

    @contextmanager
    def node_first(self) -> Iterator[None]:
        """One process of each machine first: what it downloads or makes is there when the others come."""
        self._turn += 1
        key = f"first/{self._turn}/{self.node}"
        if self.local and not self.alone:
            self._get(key)
        yield
        if not self.local and not self.alone:
            self._store.set(key, "done")

    # -- within a step

    def everyone(self, values: Sequence[float], doing: str) -> list[list[float]]:
        """The values of every rank, by rank. Raises RunFailed, naming who is missing, when one does not come."""
        if self.alone:
            return [list(values)]
        import torch

        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._arrived += 1
        self.begins(doing)
        try:
            self._numbers.allgather([found], [own]).wait()
        except RuntimeError as error:
            raise RunFailed(self._missing(error)) from error
        return [each.tolist() for each in found]

    def begins(self, doing: str) -> None:
        """What this rank does from now on, for the message of one that waits for it."""
        if not self.alone:
            self._store.set(f"at/{self.rank}", json.dumps([self._arrived, time.time(), doing]))

    def total(self, values: Sequence[float], doing: str) -> list[float]:
        """The sum over all ranks of each value."""
        return [sum(column) for column in zip(*self.everyone(values, doing), strict=True)]

    def add_gradients(self, parameters: "Iterable[torch.nn.Parameter]") -> None:
        """Replace each gradient by its sum over the ranks; one that is missing counts as zeros."""
        if self.alone:
            return
        import torch

        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._in_buckets(gradients, lambda flat: self._gradients.allreduce([flat]))

    def copy_from_first(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Give every rank the values of rank 0's."""
        if not self.alone:
            import torch.distributed as dist

            from_first = dist.BroadcastOptions()
            self._in_buckets(
                [each.detach() for each in tensors], lambda flat: self._gradients.broadcast([flat], from_first)
            )

    def _in_buckets(self, tensors: "list[torch.Tensor]", exchange: Callable[["torch.Tensor"], Any]) -> None:
        """`exchange` of many tensors as few flat ones."""
        import torch

        numbers = [values // BUCKET_VALUES for values in accumulate(map(torch.numel, tensors))]
        for _, group in groupby(zip(numbers, tensors, strict=True), lambda pair: pair[0]):
            bucket = [tensor for _, tensor in group]
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            exchange(flat).wait()
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def check_same(self, found: dict[str, str]) -> None:
        """Raise RunFailed unless every rank has the same values."""
        for rank, theirs in enumerate(self.gather(found)):
            for name, value in theirs.items():
                if value != found[name]:
                    raise RunFailed(f"{name} is {value} on rank {rank}, and {found[name]} on rank {self.rank}")

    # -- what goes wrong

    def part(self, error: str) -> str:
        """After a failure: this process goes on alone, and the others are told why. Returns whose failure it was."""
        if self.alone:
            return error
        self._apart = True
        with suppress(RuntimeError):
            own = json.dumps([self.rank, error])
            rank, first = json.loads(self._store.compare_set("failed", "", own))
            return first if rank == self.rank else f"rank {rank}: {first}"
        return error

    def _missing(self, error: RuntimeError) -> str:
        """Who did not come to the exchange where this process waited, and what each was doing last."""
        late = []
        for rank in range(self.size):
            arrived, since, doing = 0, 0.0, "the start"
            with suppress(RuntimeError):
                if self._store.check([f"at/{rank}"]):
                    arrived, since, doing = json.loads(self._store.get(f"at/{rank}"))
            if arrived < self._arrived:
                clock = time.strftime("%H:%M:%S", time.localtime(since))
                late.append(f"rank {rank} did not come (last heard of at {clock}: {doing})")
        return "; ".join(late) or f"the ranks lost each other: {error}"


ALONE = Ranks()
