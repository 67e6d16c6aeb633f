"""`python backends.py`: which attention Unsloth takes on an H100, for what may be installed beside it.

Its dispatch is Unsloth's own, imported anew for each row of the table: what it finds then decides. xformers (put on
PYTHONPATH by the test) and flash-attn are stand-ins, and so are all kernels: what reaches them is recorded. One JSON
document on stdout: {row: {"pack": [kernel, heads of the keys], "rectangle": …}}.
"""

# isort: skip_file
# ruff: noqa: E402
import importlib
import json
import os
import sys
import types
from typing import Any

os.environ |= {"UNSLOTH_ALLOW_CPU": "1"}

import torch
import torch.nn.attention.varlen

torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.backends.cuda.is_flash_attention_available = lambda: True

from fasttune.core import model as models

from unsloth.models import _utils
from unsloth.utils import attention_dispatch as dispatch, flash_impl, packing

HEADS, KV_HEADS, DIM, LENGTHS = 32, 8, 128, [20, 1, 27]
TOKENS = sum(LENGTHS)
seen: list[tuple[str, int]] = []  # kernel, heads of the keys


def recorded(name: str, axis: int) -> Any:
    def kernel(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append((name, key.shape[axis]))
        return torch.zeros_like(query)

    return kernel


def torch_2_11(query: Any, key: Any, value: Any, *lengths: Any, scale: Any = None, window_size: Any = (-1, -1)) -> None:
    """As varlen_attn is declared there: Unsloth looks at its parameters."""


def torch_2_12(query: Any, key: Any, value: Any, *lengths: Any, scale: Any = None, window_size: Any = (-1, -1),
               enable_gqa: bool = False) -> None: ...  # fmt: skip


def found(varlen: Any, xformers: Any = None, flash_attn: bool = False) -> None:
    """Import the dispatch anew, where this is what Unsloth found."""
    torch.nn.attention.varlen.varlen_attn = varlen
    _utils.xformers, _utils.HAS_FLASH_ATTENTION = xformers, flash_attn
    _utils.xformers_attention = recorded("xformers", 2)
    packing._XFormersBlockMask = xformers.attn_bias.BlockDiagonalCausalMask if xformers else None
    sys.modules["flash_attn"] = types.SimpleNamespace(
        flash_attn_func=recorded("flash-attn", 2), flash_attn_varlen_func=recorded("flash-attn, variable length", 1)
    )
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    importlib.reload(dispatch)
    torch.cuda.is_available = lambda: False


def runs() -> dict[str, list[Any]]:
    """What a pack and a rectangle of a grouped-query model in training come to; calls of one kernel once each."""
    # true of bf16 tensors on a card, which these are not
    dispatch._torch_varlen_takes = lambda *_: dispatch._TORCH_VARLEN_ATTN is not None
    dispatch._torch_varlen_beats_segments = lambda *_: True
    dispatch._LeanFlashVarlen = types.SimpleNamespace(apply=recorded("torch, variable length", 1))
    dispatch.scaled_dot_product_attention = lambda q, k, v, **_: recorded("torch SDPA", 1)(q, k)
    q, k, v = (torch.zeros(1, heads, TOKENS, DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    starts = torch.tensor([0, 20, 21, 48], dtype=torch.int32)
    table = {}
    for shape, info in (("pack", (lengths, starts, max(LENGTHS))), ("rectangle", None)):
        seen.clear()
        backend = dispatch.select_attention_backend(use_varlen=info is not None)
        config = dispatch.AttentionConfig(backend, KV_HEADS, HEADS // KV_HEADS, {"causal": True}, {"causal": True})
        context = dispatch.AttentionContext(1, TOKENS, TOKENS, HEADS, DIM, True, info, None, None, training=True)
        dispatch.run_attention(config=config, context=context, Q=q, K=k, V=v)
        kernel, heads = seen[0]
        table[shape] = [f"{kernel}, {len(seen)} calls" if len(seen) > 1 else kernel, heads]
    return table


def with_fasttune() -> dict[str, list[Any]]:
    models.take_varlen_kernel()
    return runs()


def flash_attention_3(hidden: int, has_backward: bool = True) -> str | None:
    """What Unsloth puts in its place for a model of this width; its check on a card is taken for passed."""
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    ops = types.SimpleNamespace(fwd=0, bwd=0) if has_backward else types.SimpleNamespace(fwd=0)
    torch.ops.flash_attn_3 = ops
    sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
    flash_impl._probe_error = lambda *_: None
    config = types.SimpleNamespace(hidden_size=hidden, num_attention_heads=hidden // DIM, num_key_value_heads=2)
    active = flash_impl.maybe_activate_flash_attention_impl(types.SimpleNamespace(config=config))
    torch.cuda.is_available = lambda: False
    return active


def main() -> None:
    report: dict[str, Any] = {"xformers is hidden": _utils.xformers is None and not dispatch.HAS_XFORMERS}
    found(torch_2_11, _utils.xformers)  # with xformers on the path, and what fasttune makes of it
    report["fasttune, torch 2.11"] = with_fasttune()
    found(torch_2_12)
    report["fasttune, torch 2.12"] = with_fasttune()
    found(torch_2_11, flash_attn=True)
    report["fasttune, flash-attn"] = with_fasttune()
    found(torch_2_11)
    report["Unsloth, torch 2.11"] = runs()
    sys.modules.pop("xformers", None)
    xformers = importlib.import_module("xformers.ops.fmha")
    for name, varlen in (("2.11", torch_2_11), ("2.12", torch_2_12)):
        found(varlen, xformers)
        report[f"Unsloth, xformers, torch {name}"] = runs()
    report["FlashAttention 3"] = [flash_attention_3(2048), flash_attention_3(1024), flash_attention_3(2048, False)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
