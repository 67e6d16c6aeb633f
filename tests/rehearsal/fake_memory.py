"""Peak memory of plain Hugging Face training at the real size of a model, on any machine and in seconds.

FakeTensorMode runs the very code of transformers, PEFT and autograd on tensors that have a shape and a dtype but no
values, and `Live` adds up the bytes that live at any moment. Kernels that need a GPU stand in as `Kernel`: what they
keep for backward, and what they make.

    python fake_memory.py < cases.json      # [[config as YAML, arguments of peak_gib and _peak_gib], …] → [GiB, …]

A process of its own: the plain arms never import unsloth, which would patch transformers here.
"""

import contextlib
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from accelerate.utils.operations import ConvertOutputsToFp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface

from fasttune.bench.arms import plain_lora
from fasttune.config import Config, parse

FUSED = "fake_fused"
FEW_LAYERS = (1, 2)


class Live(TorchDispatchMode):
    """Bytes of all storages that are made inside of it and not freed yet, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return made

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.remove, key, size).atexit = False

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


class Kernel(torch.autograd.Function):
    """A fused kernel: `make(*inputs)` gives its output and what it keeps; backward makes a gradient of each input."""

    @staticmethod
    def forward(ctx: Any, make: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor:
        output, kept = make(*inputs)
        ctx.save_for_backward(*kept)
        ctx.like = [(each.shape, each.dtype) for each in inputs]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        assert ctx.saved_tensors
        wanted = zip(ctx.like, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty(shape, dtype=dtype) if needed else None for (shape, dtype), needed in wanted)


def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """SDPA's fused kernels on a GPU (B, H, T, D) → (B, T, H, D): with a mask transformers repeats keys and values for
    every head, and the kernel takes the mask as a bias of its own dtype."""
    kept = ()
    if attention_mask is not None:
        key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
        kept = (attention_mask.to(query.dtype),)

    def make(query: Any, key: Any, value: Any) -> Any:
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width)
        return out, (query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32), *kept)

    return Kernel.apply(make, query, key, value), None


def fake_mask(batch_size: int, q_length: int, attention_mask: Any = None, **_: Any) -> torch.Tensor | None:
    """(B, 1, T, T), as sdpa_mask makes it of padded rows; none where no row is padded."""
    if attention_mask is None:
        return None
    return torch.empty(batch_size, 1, q_length, q_length, dtype=torch.bool)


def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Liger's: keeps its input and a number a token."""

    def make(hidden: Any, weight: Any) -> Any:
        return torch.empty_like(hidden), (hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))

    return Kernel.apply(make, hidden, module.weight)


def mlp(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Liger's: keeps gate and up, and computes their product again."""

    def make(gate: Any, up: Any) -> Any:
        return torch.empty_like(gate), (gate, up)

    return module.down_proj(Kernel.apply(make, module.gate_proj(hidden), module.up_proj(hidden)))


def linear_loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Liger's: chunks as large as the hidden states; their gradient is made in forward."""

    def make(hidden: Any, head: Any) -> Any:
        gradient = torch.empty_like(hidden)
        chunks = [torch.empty_like(hidden) for _ in range(3)]  # logits, their fp32
        kept = (gradient, torch.empty_like(head)) if head.requires_grad else (gradient,)
        return chunks[0].new_empty(()), kept

    return Kernel.apply(make, hidden, head)


@contextlib.contextmanager
def fake_model(sizes: dict[str, Any], config: Config, tuned: bool) -> Iterator[Any]:
    """A model in bf16 inside of the mode, with the job's adapter if it has one; `tuned`: and with Liger's kernels."""
    AttentionInterface.register(FUSED, attention)
    AttentionMaskInterface.register(FUSED, fake_mask)
    before = torch.get_default_dtype()
    with torch.device("meta"), no_init_weights():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig.from_dict(sizes))
        finally:
            torch.set_default_dtype(before)
        model.config._attn_implementation = FUSED
        whole = plain_lora(model, config) if config.train.method == "lora" else model
    with FakeTensorMode():
        for module in whole.modules():
            kind = type(module).__name__
            if tuned and kind in ("LlamaRMSNorm", "LlamaMLP"):
                module.forward = (norm if kind == "LlamaRMSNorm" else mlp).__get__(module)
            for name, each in module._parameters.items():  # PEFT cannot wrap a fake one
                if each is not None:
                    module._parameters[name] = torch.nn.Parameter(real(each), requires_grad=each.requires_grad)
            for name, each in module._buffers.items():
                module._buffers[name] = real(each)
        yield whole


def real(tensor: torch.Tensor) -> torch.Tensor:
    """As large on the CPU: of no values either, inside FakeTensorMode."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def peak_gib(sizes: dict[str, Any], config: Config, optimizer_gib: float, **case: Any) -> float:
    """Of all layers, from two small numbers of them: each adds as much as the one before. With the optimizer's own."""
    few, more = (_peak_gib(sizes | {"num_hidden_layers": number}, config, **case) for number in FEW_LAYERS)
    a_layer = (more - few) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    return few + (sizes["num_hidden_layers"] - FEW_LAYERS[0]) * a_layer + optimizer_gib


def _peak_gib(sizes: dict[str, Any], config: Config, rows: int, length: int, masked: bool, tuned: bool) -> float:
    """GiB of a micro-batch (rows, length) that is not a step's first: weights, gradients that are added up, and what
    forward and backward hold at once."""
    with fake_model(sizes, config, tuned) as model:
        model.train()
        there = [*model.parameters(), *model.buffers()]
        held = sum(tensor.nbytes for tensor in there)
        given = {"input_ids": torch.zeros(rows, length, dtype=torch.long), "use_cache": False}
        given |= {"attention_mask": torch.ones(rows, length, dtype=torch.long)} if masked else {}
        # As accelerate wraps a model for bf16: logits leave it as fp32.
        forward = ConvertOutputsToFp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
        with Live() as live:
            live.known |= {tensor.untyped_storage()._cdata for tensor in there}
            for _ in range(2):
                live.peak = live.bytes
                if tuned:
                    base = model.get_base_model() if config.train.method == "lora" else model
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = linear_loss(base.model(**given).last_hidden_state, base.lm_head.weight)
                else:
                    made = forward(**given, labels=given["input_ids"])
                    loss = made.loss
                    del made
                loss.backward()
                del loss
        return (held + live.peak) / 2**30


if __name__ == "__main__":
    found = []
    for text, case in json.load(sys.stdin):
        asked = parse(yaml.safe_load(text))
        with open(f"{asked.model.name}/config.json", encoding="utf-8") as file:
            found.append(peak_gib(json.load(file), asked, **case))
    print(json.dumps(found))
