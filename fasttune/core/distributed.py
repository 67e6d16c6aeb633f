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
from datetime import timedelta
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from fasttune.core.ranks import DIVIDED, Ranks, divided_is_asked_for
from fasttune.errors import FasttuneError, RunFailed

if TYPE_CHECKING:
    import torch

# What torchrun sets: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
HIDDEN = (*PLACE, *ADDRESS, "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", DIVIDED)
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
TIMEOUT = "FASTTUNE_RANK_TIMEOUT_S"  # seconds that a process waits for the others within a step
DEFAULT_TIMEOUT_S = "600"
BUCKET_VALUES = 64 * 2**20  # gradients that are summed at once
LEAST_PAUSE_S, MOST_PAUSE_S = 0.001, 0.25  # between two looks at what another process may have said


def of_environment() -> Ranks:
    """As torchrun's environment says. Raises FasttuneError where a part of it is missing."""
    if missing := [name for name in (*PLACE, *ADDRESS) if name not in os.environ]:
        raise FasttuneError(f"RANK is set, {', '.join(missing)} not: start several processes with torchrun")
    kind: type[Several] = Several
    if divided_is_asked_for() and os.environ["WORLD_SIZE"] != "1":
        from fasttune.core import sharded

        kind = sharded.Sharded
    return kind(*(int(os.environ[name]) for name in PLACE), *(int(os.environ.get(name, "0")) for name in RESTARTS))


class Several(Ranks):
    def __init__(
        self, rank: int, size: int, local: int, local_size: int, node: int, restarts: int, most_restarts: int
    ) -> None:
        self.rank, self.size, self.local, self.local_size, self.node = rank, size, local, local_size, node
        self.restarts, self.most_restarts = restarts, most_restarts
        self.alone = size == 1
        self._turn = 0  # things told so far: the same on every rank
        self._arrived = 0  # exchanges so far

    def connect(self) -> None:
        if not self.alone:
            from fasttune import cpu

            cpu.ask_for_huge_pages()
            import torch
            import torch.distributed as dist

            self.timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, DEFAULT_TIMEOUT_S)))
            found, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=self.timeout))
            self._found = dist.PrefixStore(f"fasttune/{self.restarts}", found)  # torchrun keeps what was said before
            self._store, _, _ = self.place("said")
            # Not init_process_group: Unsloth and transformers would find it, and meet in places of their own.
            self._numbers = self._gradients = dist.ProcessGroupGloo(*self.place("numbers"), self.timeout)
            if torch.cuda.is_available():
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self.timeout
                self._gradients = dist.ProcessGroupNCCL(*self.place("gradients"), options)
        for name in [name for name in os.environ if name in HIDDEN or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]

    def place(self, name: str) -> tuple[Any, int, int]:
        """Where a process group of this name meets, this rank, and of how many."""
        import torch.distributed as dist

        return dist.PrefixStore(name, self._found), self.rank, self.size

    # -- what all know

    def agree(self, value: Any) -> Any:
        return value if self.alone else self._told(value, [0])[0]

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.alone else self._told(value, list(range(self.size)))

    def _told(self, value: Any, tellers: list[int]) -> list[Any]:
        self._turn += 1
        if self.rank in tellers:
            self._store.set(f"told/{self._turn}/{self.rank}", json.dumps(value))
        return [json.loads(self._get(f"told/{self._turn}/{rank}")) for rank in tellers]

    def _get(self, key: str) -> bytes:
        """Looks again and again: a wait inside the store would hear no signal, and warn when it is long."""
        pause_s = LEAST_PAUSE_S
        while not self._store.check([key]):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)
        return bytes(self._store.get(key))

    def check_same(self, found: dict[str, str]) -> None:
        for rank, theirs in enumerate(self.gather(found)):
            for name, value in theirs.items():
                if value != found[name]:
                    raise RunFailed(f"{name} is {value} on rank {rank}, and {found[name]} on rank {self.rank}")

    @contextmanager
    def node_first(self) -> Iterator[None]:
        self._turn += 1
        key = f"first/{self._turn}/{self.node}"
        if self.local and not self.alone:
            self._get(key)
        yield
        if not self.local and not self.alone:
            self._store.set(key, "done")

    # -- within a step

    def everyone(self, values: Sequence[float], doing: str) -> list[list[float]]:
        if self.alone:
            return super().everyone(values, doing)
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
        if not self.alone:
            self._store.set(f"at/{self.rank}", json.dumps([self._arrived, time.time(), doing]))

    def add_gradients(self, parameters: "Iterable[torch.nn.Parameter]") -> None:
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
        if self.alone:
            return
        import torch.distributed as dist

        options = dist.BroadcastOptions()  # its root is 0
        self._in_buckets([each.detach() for each in tensors], lambda flat: self._gradients.broadcast([flat], options))

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

    # -- what goes wrong

    def part(self, error: str) -> str:
        if self.alone:
            return error
        self.alone = True
        with suppress(RuntimeError):
            own = json.dumps([self.rank, error])
            rank, first = json.loads(self._store.compare_set("failed", "", own))
            return first if first == error or rank == self.rank else f"rank {rank}: {first}"
        return error

    def _missing(self, error: RuntimeError) -> str:
        """Who did not come to the exchange where this process waited, and what each was doing last."""
        late = []
        for rank in range(self.size):
            arrived, since_s, doing = 0, 0.0, "the start"
            with suppress(RuntimeError):
                if self._store.check([f"at/{rank}"]):
                    arrived, since_s, doing = json.loads(self._store.get(f"at/{rank}"))
            if arrived < self._arrived:
                clock = time.strftime("%H:%M:%S", time.localtime(since_s))
                late.append(f"rank {rank} did not come (at {clock} it began: {doing})")
        return "; ".join(late) or f"the ranks lost each other, as when one is killed ({str(error)[:150]} …)"
