"""Executed arithmetic: every attention backend, a bf16 matmul and Llama 3.1's rotary frequencies against references.

Attention has two inputs: causal grouped-query (8 query heads on 2 key/value heads), and the same packed: several
sequences in one row that must not see each other. All tensors here are (B, T, H, D), the layout of flash-attn and
varlen; PyTorch's SDPA wants (B, H, T, D). The kernel that ran is read from torch.profiler, and a wrong one
is a failure.
"""

import importlib.util
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from fasttune.verify import PIP, Result, judged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 160, 8, 2, 128
PACKED = [70, 31, 59]  # lengths of the sequences in the packed row; no multiples of a kernel's block
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Limits as multiples of eps. bf16 kernels accumulate in float32: probabilities and result are rounded, half an eps
# each; gradients of a shared key/value head add four rounded ones. float32 rounds at each of TOKENS additions instead.
FORWARD_EPS, GRADIENT_EPS = (1, 4) if torch.bfloat16 == DTYPE else (16, 16)
NEEDED_ON_GPU = ("attention:sdpa-flash", "attention:torch-varlen")  # what the stacks train with
# Neither flash-attn is part of a stack: without one, PyTorch's kernels are used.
REMEDY = {
    "attention:flash-attn": f"{PIP} uninstall -y flash-attn && bash scripts/setup_h100.sh --flash-attn auto",
    "attention:flash-attn-3": f"{PIP} uninstall -y flash-attn-3",
}

Lengths = list[int] | None  # of the packed sequences
Attention = Callable[[Tensor, Tensor, Tensor, Lengths], Tensor]  # q (B, T, Hq, D), k (B, T, Hk, D), v → (B, T, Hq, D)


class Unavailable(Exception):
    """The backend does not take this input on this device."""


@dataclass(frozen=True)
class Measured:
    forward: float
    gradient: float
    ran: list[str]

    @property
    def ok(self) -> bool:
        eps = torch.finfo(DTYPE).eps
        return self.forward <= FORWARD_EPS * eps and self.gradient <= GRADIENT_EPS * eps


def relative_error(got: Tensor, reference: Tensor) -> float:
    """max |got - reference| / max |reference|, in float64; inf if anything is not finite or a shape differs."""
    if got.shape != reference.shape or not torch.isfinite(got).all():
        return math.inf
    got, reference = got.detach().double(), reference.detach().double()
    return float((got - reference).abs().max() / reference.abs().max())


# -- attention


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """softmax(q kᵀ / √D + causal and block mask) v in the inputs' precision; (B, T, H, D). No fused kernel."""
    batch, tokens, q_heads, head_dim = q.shape
    grouped = q.view(batch, tokens, k.shape[2], q_heads // k.shape[2], head_dim)
    scores = torch.einsum("bthgd,bshd->bhgts", grouped, k) / head_dim**0.5
    sequence = torch.repeat_interleave(torch.arange(len(lengths or [1])), torch.tensor(lengths or [tokens]))
    allowed = torch.ones(tokens, tokens).tril().bool() & (sequence[:, None] == sequence)
    weights = scores.masked_fill(~allowed.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("bhgts,bshd->bthgd", weights, v).reshape(q.shape)


def measure(attention: Attention, lengths: Lengths) -> Measured:
    """Run `attention` forward and backward on random data beside the float64 reference, under the profiler."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens = (BATCH, TOKENS) if lengths is None else (1, sum(lengths))
    q_heads, kv_heads = (batch, tokens, Q_HEADS, HEAD_DIM), (batch, tokens, KV_HEADS, HEAD_DIM)
    inputs = [torch.randn(shape, generator=generator) for shape in (q_heads, kv_heads, kv_heads)]
    upstream = torch.randn(q_heads, generator=generator).to(DTYPE)
    exact = [tensor.to(DTYPE).double().requires_grad_() for tensor in inputs]
    expected = reference(exact[0], exact[1], exact[2], lengths)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())

    q, k, v = (tensor.to(DEVICE, DTYPE).requires_grad_() for tensor in inputs)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as profiler:
        out = attention(q, k, v, lengths)
        gradients = torch.autograd.grad(out, (q, k, v), upstream.to(DEVICE))
    errors = [relative_error(a.cpu(), b) for a, b in zip(gradients, expected_gradients, strict=True)]
    ran = attention_kernels([event.key for event in profiler.key_averages()])
    return Measured(relative_error(out.cpu(), expected), max(errors), ran)


def attention_kernels(names: list[str]) -> list[str]:
    """The forward attention operators and GPU kernels among profiler names, shortened to what tells them apart."""
    found = set()
    for name in names:
        is_attention = re.search(r"attention_|fmha|flash_fwd|flash_attn|varlen|cudnn.*sdpa", name)
        if is_attention and not re.search(r"backward|bwd", name):
            short = re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1]
            found.add(name if name.startswith("flash_attn_3::") else short)  # its operators are called fwd and bwd
    return sorted(found)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """One SDPA backend, forced, in the first way that it takes: key/value heads grouped, or repeated; a pack with a
    block mask, or in one call a sequence."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, D)
    reasons: list[str] = []
    for grouped, masked in itertools.product((True, False), (True, False) if lengths else (False,)):
        copies = 1 if grouped else Q_HEADS // KV_HEADS
        keys, values = (tensor.repeat_interleave(copies, dim=1) for tensor in (k, v))
        blocks = [torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril() for n in lengths or ()]
        options: dict[str, Any] = {"attn_mask": torch.block_diag(*blocks)} if masked else {"is_causal": True}
        calls = lengths if lengths and not masked else [q.shape[2]]
        with sdpa_kernel(backend), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                parts = zip(*(tensor.split(calls, dim=2) for tensor in (q, keys, values)), strict=True)
                outs = [F.scaled_dot_product_attention(*part, enable_gqa=grouped, **options) for part in parts]
                return torch.cat(outs, dim=2).transpose(1, 2)
            except RuntimeError as error:
                if not re.search(r"No (available|viable)", str(error)):
                    raise
                said = [str(warning.message) for warning in caught] or [str(error)]
                reasons += [text.splitlines()[0] for text in said]
    raise Unavailable("this torch has no such CPU kernel" if DEVICE == "cpu" else "; ".join(dict.fromkeys(reasons)))


def cuda_module(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise Unavailable("not installed")
    if DEVICE == "cpu":
        raise Unavailable("has CUDA kernels only")
    return importlib.import_module(name)


def starts(lengths: list[int]) -> Tensor:
    """Cumulative sequence starts [0, n1, n1 + n2, …], int32, as variable-length kernels take them."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """torch.nn.attention.varlen on flattened rows (B·T, H, D)."""
    kernel = cuda_module("torch.nn.attention.varlen").varlen_attn
    rows = lengths or [q.shape[1]] * q.shape[0]
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(kernel).parameters:  # torch 2.12; 2.11 takes grouped heads unasked
        options["enable_gqa"] = True
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    out: Tensor = kernel(*flat, starts(rows), starts(rows), max(rows), max(rows), **options)
    return out.view(q.shape)


def flash_attn(module: str, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """flash-attn 2 (`flash_attn`) or 3 (`flash_attn_interface`): both take (B, T, H, D), packed (ΣT, H, D)."""
    package = cuda_module(module)
    if lengths is None:
        out = package.flash_attn_func(q, k, v, causal=True)
    else:
        ends, longest = starts(lengths), max(lengths)
        out = package.flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, longest, longest, causal=True)
    first: Tensor = out[0] if isinstance(out, tuple) else out  # FA3 returns the log-sum-exp too
    return first.view(q.shape)


def check_backend(name: str, attention: Attention, must_run: str) -> Iterator[Result]:
    """Causal, then packed; `must_run` is a pattern that one of the kernels that ran has to match."""
    eps = torch.finfo(DTYPE).eps
    for suffix, lengths in (("", None), ("-packed", PACKED)):
        try:
            seen = measure(attention, lengths)
        except Unavailable as error:
            if DEVICE == "cuda" and name in NEEDED_ON_GPU:
                yield judged(name + suffix, False, str(error), reinstall=("torch",))
            else:
                yield Result(name + suffix, "skip", str(error))
            if not suffix:
                return
            continue
        detail = (
            f"max error {seen.forward:.1e} (limit {FORWARD_EPS * eps:.1e}), gradients {seen.gradient:.1e} "
            f"({GRADIENT_EPS * eps:.1e}), ran {', '.join(seen.ran) or 'no known attention kernel'}"
        )
        right_kernel = any(re.search(must_run, kernel) for kernel in seen.ran)
        detail += "" if right_kernel else f"; asked for {must_run}"
        yield judged(name + suffix, seen.ok and right_kernel, detail, REMEDY.get(name, ""), reinstall=("torch",))


# -- matmul, rotary frequencies


def matmul() -> Iterator[Result]:
    """(256, 1024) @ (1024, 256) in bf16. Products are summed in float32 and rounded once (or once a split): 1 eps."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 1024, generator=generator).bfloat16()
    b = torch.randn(1024, 256, generator=generator).bfloat16()
    got = (a.to(DEVICE) @ b.to(DEVICE)).cpu()
    error, limit = relative_error(got, a.double() @ b.double()), torch.finfo(torch.bfloat16).eps
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    detail = f"max error {error:.1e} (limit {limit:.1e}) on {where}"
    yield judged("matmul-bf16", error <= limit, detail, reinstall=("torch",))


def llama31() -> dict[str, Any]:
    """The rotary fields of the published config.json; transformers 5 moves them into rope_parameters itself."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    scaling |= {"original_max_position_embeddings": 8192}
    return {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 131072}


def llama31_frequencies(head_dim: int) -> list[float]:
    """Llama 3.1's rotary frequencies, written from Meta's formula alone.

    Wavelengths below 8192/high_freq_factor stay, those above 8192/low_freq_factor are divided by `factor`, between the
    two the frequencies are mixed linearly in 8192/wavelength.
    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling).
    """
    theta, factor, low, high, original = 5e5, 8, 1, 4, 8192
    frequencies = []
    for i in range(0, head_dim, 2):
        frequency = theta ** (-i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low:
            frequency /= factor
        elif wavelength >= original / high:
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


def rope() -> Iterator[Result]:
    """Llama-3.1-8B's rotary fields (head_dim 128) through transformers' config into its live module."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    live = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=128, **llama31())).inv_freq.double()
    expected = torch.tensor(llama31_frequencies(128), dtype=torch.float64)
    error = relative_error(live / expected, torch.ones_like(expected)) if live.shape == expected.shape else math.inf
    limit = 8 * torch.finfo(torch.float32).eps
    detail = f"{live.numel()} frequencies of 64, max relative error {error:.1e} (limit {limit:.1e})"
    yield judged("rope-llama31", error <= limit, detail, reinstall=("transformers",))


BACKENDS: dict[str, tuple[Attention, str]] = {
    "attention:sdpa-math": (partial(sdpa, SDPBackend.MATH), "attention_math"),
    "attention:sdpa-flash": (partial(sdpa, SDPBackend.FLASH_ATTENTION), "flash_attention"),
    "attention:sdpa-efficient": (partial(sdpa, SDPBackend.EFFICIENT_ATTENTION), "efficient_attention"),
    "attention:sdpa-cudnn": (partial(sdpa, SDPBackend.CUDNN_ATTENTION), "cudnn_attention"),
    "attention:torch-varlen": (torch_varlen, "flash|cudnn"),
    "attention:flash-attn": (partial(flash_attn, "flash_attn"), "flash"),
    "attention:flash-attn-3": (partial(flash_attn, "flash_attn_interface"), "flash"),
}
CHECKS: dict[str, Callable[[], Iterator[Result]]] = {
    name: partial(check_backend, name, attention, must_run) for name, (attention, must_run) in BACKENDS.items()
}
CHECKS |= {"matmul-bf16": matmul, "rope-llama31": rope}
