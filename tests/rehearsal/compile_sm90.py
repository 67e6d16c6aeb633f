"""`python compile_sm90.py`: what Unsloth launches for Llama-3.1-8B, compiled for an H100 where there is none.

Unsloth's own functions run on tensors without data, so block sizes and warps are those that it chooses; Triton is told
that the card is an H100, compiles, and launches nothing. One JSON line for each kernel: its name, warps, shared memory.
"""

# isort: skip_file
# ruff: noqa: E402
import json
import os
from typing import Any

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}

import torch

torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (9, 0)

from unsloth.kernels import cross_entropy_loss, rms_layernorm, rope_embedding, swiglu

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOKENS, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 8192, 4096, 14336, 32, 8, 128, 128_256


class H100:
    """As much of a Triton driver as a compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


triton.runtime.driver.set_active(H100())
run = JITFunction.run


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    facts = {"kernel": self.fn.__name__, "warps": compiled.metadata.num_warps, "shared_bytes": compiled.metadata.shared}
    print(json.dumps(facts | {"for": compiled.metadata.target.arch, "machine_code": len(compiled.asm["cubin"])}))
    return compiled


JITFunction.run = compile_only


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(trained)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def main() -> None:
    for trained in (False, True):  # LoRA, full
        weight = empty(HIDDEN, trained=trained)
        backward(rms_layernorm.Fast_RMS_Layernorm.apply(empty(1, TOKENS, HIDDEN), weight, 1e-5, False))

    gate, up = empty(1, TOKENS, WIDTH, trained=False), empty(1, TOKENS, WIDTH, trained=False)
    swiglu.swiglu_fg_kernel(gate, up)
    swiglu.swiglu_DWf_DW_dfg_kernel(empty(TOKENS, WIDTH, trained=False), gate[0], up[0])

    cos, sin = (empty(TOKENS, HEAD_DIM, trained=False) for _ in range(2))
    for positions in (empty(1, TOKENS, dtype=torch.int32, trained=False), None):  # a pack, a rectangle
        q, k = (empty(1, TOKENS, heads, HEAD_DIM).transpose(1, 2) * 1 for heads in (HEADS, KV_HEADS))
        backward(*rope_embedding.fast_rope_embedding(q, k, cos, sin, positions))

    labels = empty(TOKENS, dtype=torch.int64, trained=False)
    for vocabulary in (VOCABULARY, 32_000):  # in chunks, and whole
        backward(cross_entropy_loss.Fast_CrossEntropyLoss.apply(empty(TOKENS, vocabulary), labels, 0, 0))


if __name__ == "__main__":
    main()
