"""Every attention backend that is present, run forward and backward against plain float64 attention.

Two inputs: causal grouped-query (8 query heads on 2 key/value heads), and the same packed: several sequences in one
row that must not see each other. All tensors here are (B, T, H, D), the layout of flash-attn, xformers and varlen;
PyTorch's SDPA wants (B, H, T, D). The kernel that ran is read from torch.profiler, and a wrong one is a failure.
"""

import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from fasttune.verify import Result, install_command, version_rules
from fasttune.verify.kernels import DEVICE, relative_error

BATCH, TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 160, 8, 2, 128
PACKED = [70, 31, 59]  # lengths of the sequences in the packed row; no multiples of a kernel's block
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Limits as multiples of eps. bf16 kernels accumulate in float32: probabilities and result are rounded, half an eps
# each; gradients of a shared key/value head add four rounded ones. float32 rounds at each of TOKENS additions instead.
FORWARD_EPS, GRADIENT_EPS = (1, 4) if torch.bfloat16 == DTYPE else (16, 16)

# (q (B, T, Hq, D), k (B, T, Hk, D), v, lengths of the packed sequences or None) -> (out (B, T, Hq, D), how)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[int] | None], tuple[torch.Tensor, str]]


class Unavailable(Exception):
    """The backend does not take this input on this device."""


@dataclass(frozen=True)
class Measured:
    forward: float
    gradient: float
    ran: list[str]
    how: str

    @property
    def ok(self) -> bool:
        eps = torch.finfo(DTYPE).eps
        return self.forward <= FORWARD_EPS * eps and self.gradient <= GRADIENT_EPS * eps


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None) -> torch.Tensor:
    """softmax(q kᵀ / √D + causal and block mask) v in the inputs' precision; (B, T, Hq, D). No fused kernel."""
    batch, tokens, q_heads, head_dim = q.shape
    grouped = q.view(batch, tokens, k.shape[2], q_heads // k.shape[2], head_dim)
    scores = torch.einsum("bthgd,bshd->bhgts", grouped, k) / head_dim**0.5
    sequence = torch.repeat_interleave(torch.arange(len(lengths or [1])), torch.tensor(lengths or [tokens]))
    allowed = torch.ones(tokens, tokens).tril().bool() & (sequence[:, None] == sequence)
    weights = scores.masked_fill(~allowed.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("bhgts,bshd->bthgd", weights, v).reshape(q.shape)


def measure(attention: Attention, lengths: list[int] | None) -> Measured:
    """Run `attention` forward and backward on random data beside the float64 reference, under the profiler."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens = (BATCH, TOKENS) if lengths is None else (1, sum(lengths))
    inputs = [
        torch.randn(batch, tokens, heads, HEAD_DIM, generator=generator) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    ]
    upstream = torch.randn(batch, tokens, Q_HEADS, HEAD_DIM, generator=generator).to(DTYPE)
    exact = [tensor.to(DTYPE).double().requires_grad_() for tensor in inputs]
    expected = reference(exact[0], exact[1], exact[2], lengths)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())

    q, k, v = (tensor.to(DEVICE, DTYPE).requires_grad_() for tensor in inputs)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as profiler:
        out, how = attention(q, k, v, lengths)
        gradients = torch.autograd.grad(out, (q, k, v), upstream.to(DEVICE))
    errors = [relative_error(a.cpu(), b) for a, b in zip(gradients, expected_gradients, strict=True)]
    ran = attention_kernels([event.key for event in profiler.key_averages()])
    return Measured(relative_error(out.cpu(), expected), max(errors), ran, how)


def attention_kernels(names: list[str]) -> list[str]:
    """The forward attention operators and GPU kernels among profiler names, shortened to what tells them apart."""
    found = []
    for name in names:
        short = re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1]
        is_attention = re.search(r"attention_|fmha|flash_fwd|flash_attn|varlen|cudnn.*sdpa", name)
        if is_attention and not re.search(r"backward|bwd", name):
            found.append(short)
    return sorted(set(found))


def sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None):  # type: ignore[no-untyped-def]
    """One SDPA backend, forced. Where it takes no grouped heads they are repeated; no mask: one call a sequence."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, D)
    reasons: list[str] = []
    for grouped in (True, False):
        keys, values = (k, v) if grouped else (repeated(k, 1), repeated(v, 1))
        for whole_row in (True, False) if lengths else (True,):
            with sdpa_kernel(backend), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    out = _sdpa_call(q, keys, values, lengths, grouped, whole_row)
                except RuntimeError as error:
                    if not re.search(r"No (available|viable)", str(error)):
                        raise
                    reasons += [str(warning.message).splitlines()[0] for warning in caught] or [
                        str(error).splitlines()[0]
                    ]
                    continue
            how = ["" if grouped else "key/value heads repeated"]
            if lengths:
                how.append("block mask" if whole_row else "one call a sequence")
            return out.transpose(1, 2), ", ".join(part for part in how if part)
    raise Unavailable("this torch has no such CPU kernel" if DEVICE == "cpu" else "; ".join(dict.fromkeys(reasons)))


def _sdpa_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None, grouped: bool, whole_row: bool
) -> torch.Tensor:
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if whole_row:
        blocks = [torch.ones(n, n, dtype=torch.bool, device=q.device).tril() for n in lengths]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.block_diag(*blocks), enable_gqa=grouped)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped) for a, b, c in parts]
    return torch.cat(outs, dim=2)


def repeated(tensor: torch.Tensor, head_axis: int) -> torch.Tensor:
    """Key/value heads repeated to the number of query heads, each next to its copies."""
    return tensor.repeat_interleave(Q_HEADS // KV_HEADS, dim=head_axis)


def starts(lengths: list[int]) -> torch.Tensor:
    """Cumulative sequence starts [0, n1, n1 + n2, …], int32, as variable-length kernels take them."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None
) -> tuple[torch.Tensor, str]:
    """torch.nn.attention.varlen on flattened rows (B·T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    if DEVICE == "cpu":
        raise Unavailable("has CUDA kernels only")
    rows = lengths or [q.shape[1]] * q.shape[0]
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.12; 2.11 takes grouped heads unasked
        options["enable_gqa"] = True
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    out: Any = varlen_attn(flat[0], flat[1], flat[2], starts(rows), starts(rows), max(rows), max(rows), **options)
    return out.view(q.shape), "" if lengths is None else "cumulative lengths"


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None) -> tuple[torch.Tensor, str]:
    """xformers' memory_efficient_attention; heads repeated, as Unsloth does where gradients are needed."""
    _needs("xformers")
    from xformers.ops import fmha, memory_efficient_attention

    bias = (
        fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
        if lengths
        else fmha.attn_bias.LowerTriangularMask()
    )
    out = memory_efficient_attention(q, repeated(k, 2), repeated(v, 2), attn_bias=bias)
    return out, "key/value heads repeated"


def flash_attn(
    module: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None
) -> tuple[torch.Tensor, str]:
    """flash-attn 2 (`flash_attn`) or 3 (`flash_attn_interface`): both take (B, T, H, D), packed (ΣT, H, D)."""
    _needs(module)
    package = importlib.import_module(module)
    if lengths is None:
        out = package.flash_attn_func(q, k, v, causal=True)
    else:
        cumulative, longest = starts(lengths), max(lengths)
        flat = [tensor[0] for tensor in (q, k, v)]
        out = package.flash_attn_varlen_func(*flat, cumulative, cumulative, longest, longest, causal=True)
    out = out[0] if isinstance(out, tuple) else out  # FA3 returns the log-sum-exp too
    return out.view(q.shape), "" if lengths is None else "cumulative lengths"


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable("not installed")
    if DEVICE == "cpu":
        raise Unavailable("has CUDA kernels only")


def check(name: str, attention: Attention, must_run: str) -> Iterator[Result]:
    """Causal, then packed; `must_run` is a pattern that one of the kernels that ran has to match."""
    eps = torch.finfo(DTYPE).eps
    for suffix, lengths in (("", None), ("-packed", PACKED)):
        try:
            seen = measure(attention, lengths)
        except Unavailable as error:
            expected = DEVICE == "cuda" and name == "attention:sdpa-flash"  # the stack is built on this one
            yield Result(name + suffix, "fail" if expected else "skip", str(error), remedy(name) if expected else "")
            if not suffix:
                return
            continue
        detail = (
            f"max error {seen.forward:.1e} (limit {FORWARD_EPS * eps:.1e}), gradients {seen.gradient:.1e} "
            f"({GRADIENT_EPS * eps:.1e}), ran {', '.join(seen.ran) or 'no known attention kernel'}"
        ) + (f"; {seen.how}" if seen.how else "")
        right_kernel = any(re.search(must_run, kernel) for kernel in seen.ran)
        ok = seen.ok and right_kernel
        detail += "" if right_kernel else f"; asked for {must_run}"
        yield Result(name + suffix, "pass" if ok else "fail", detail, "" if ok else remedy(name))


def remedy(name: str) -> str:
    """What mends a backend that is wrong. Neither flash-attn is part of a stack: without one, PyTorch's are used."""
    if name == "attention:flash-attn":
        return version_rules.FLASH_ATTN_ANEW
    if name == "attention:flash-attn-3":
        return f"{version_rules.PIP} uninstall -y flash-attn-3"
    return install_command("xformers" if name == "attention:xformers" else "torch")


BACKENDS: dict[str, tuple[Attention, str]] = {
    "attention:sdpa-math": (partial(sdpa, SDPBackend.MATH), "attention_math"),
    "attention:sdpa-flash": (partial(sdpa, SDPBackend.FLASH_ATTENTION), "flash_attention"),
    "attention:sdpa-efficient": (partial(sdpa, SDPBackend.EFFICIENT_ATTENTION), "efficient_attention"),
    "attention:sdpa-cudnn": (partial(sdpa, SDPBackend.CUDNN_ATTENTION), "cudnn_attention"),
    "attention:torch-varlen": (torch_varlen, "flash|cudnn"),
    "attention:xformers": (xformers, "flash|efficient|cutlass|fmha"),
    "attention:flash-attn": (partial(flash_attn, "flash_attn"), "flash"),
    "attention:flash-attn-3": (partial(flash_attn, "flash_attn_interface"), "flash"),
}
CHECKS = {name: partial(check, name, attention, must_run) for name, (attention, must_run) in BACKENDS.items()}
