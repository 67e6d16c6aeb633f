"""A model that fits into no single GPU: each process holds one part of all weights, by Unsloth's FSDP2.

Asked for by UNSLOTH_FSDP2=1. A layer is put together where it is computed and taken apart behind it, so all processes
go through the layers together: each does the same forwards in the same order, and none may leave one out. That is why
there are no generated answers here, held-out rows are computed by all, and memory that runs out ends the run.

Source: torch's fully_shard (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) and
unsloth/models/fsdp2_native.py (2026.10.9).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fasttune.config import Config
from fasttune.core.distributed import Several
from fasttune.core.memory import EIGHT_BIT
from fasttune.core.ranks import DIVIDED
from fasttune.errors import FasttuneError
from fasttune.settings import RESIDUAL

if TYPE_CHECKING:
    import torch


class Sharded(Several):
    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.size

    def check(self, config: Config) -> None:
        check(config)

    def connect(self) -> None:
        super().connect()
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = self.place("parts")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=self.timeout)

    def loading(self) -> AbstractContextManager[Any]:
        from fasttune.core import model as models

        return models.loading_in_parts()

    def divide(self, model: Any) -> Any:
        from fasttune.core import model as models

        return models.divided(model)

    def apart(self, model: Any) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gathered(self, model: Any, trained_only: bool) -> AbstractContextManager[Any]:
        from fasttune.core import model as models

        return models.gathered(model, trained_only)

    # -- tensors

    def whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        from torch.distributed.tensor import DTensor

        found: dict[str, Any] = {}
        for name, each in tensors.items():
            if not isinstance(each, DTensor):
                found[name] = each
                continue
            value = each.full_tensor()  # every process takes part, and rank 0 keeps it
            if not self.rank:
                found[name] = value.cpu()
        return found

    def one_by_one(self, tensors: "Iterable[torch.Tensor]") -> "Iterator[torch.Tensor]":
        from torch.distributed.tensor import DTensor

        return (each.full_tensor() if isinstance(each, DTensor) else each for each in tensors)

    def part_of(self, whole: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return whole
        whole = whole.to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def held(self, tensor: "torch.Tensor") -> "torch.Tensor":
        from torch.distributed.tensor import DTensor

        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    # -- what is done by all, in place of by one

    def share(self, things: Sequence[Any]) -> Sequence[Any]:
        return things

    def sum_of_shares(self, values: list[float], doing: str) -> list[float]:
        return values

    def any_of(self, found: bool, doing: str) -> bool:
        return bool(self.total([found], doing)[0])

    def add_gradients(self, parameters: Any) -> None:
        """Each backward took their mean over the processes, where the sum is meant."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.size)

    def copy_from_first(self, tensors: Any) -> None:
        """Each has put its part there itself."""


def check(config: Config) -> None:
    """Raise FasttuneError for settings that do not work with a divided model."""
    adapter = config.train.method == "lora"
    wrong = {
        "samples=0 (`fasttune generate` shows answers afterwards)": config.samples > 0,
        "eval.problems=0 (`fasttune eval` scores answers afterwards)": config.eval.problems > 0,
        "model.quantization=none": config.model.quantization != "none",
        "train.optimizer=adamw_torch_fused": config.train.optimizer in EIGHT_BIT,
        "lora.refactor_every=null": adapter and config.lora.refactor_every is not None,
        "model.added_tokens=[]": bool(config.model.added_tokens),
        "lora.train_embeddings=false": config.lora.train_embeddings,
        "lora.init=default": adapter and config.lora.init in RESIDUAL,
    }
    if ways := [way for way, found in wrong.items() if found]:
        raise FasttuneError(f"{DIVIDED}: with a model divided among processes set {', '.join(ways)}")
