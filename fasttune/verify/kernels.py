"""Executed arithmetic: a bf16 matmul against float64, and Llama 3.1's rotary frequencies against the formula."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from fasttune.verify import Result, install_command

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """max |got - reference| / max |reference|, in float64; inf if anything is not finite or a shape differs."""
    if got.shape != reference.shape or not torch.isfinite(got).all():
        return math.inf
    got, reference = got.detach().double(), reference.detach().double()
    return float((got - reference).abs().max() / reference.abs().max())


def matmul() -> Iterator[Result]:
    """(256, 1024) @ (1024, 256) in bf16. Products are summed in float32 and rounded once (or once a split): 1 eps."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 1024, generator=generator).bfloat16()
    b = torch.randn(1024, 256, generator=generator).bfloat16()
    got = (a.to(DEVICE) @ b.to(DEVICE)).cpu()
    error, limit = relative_error(got, a.double() @ b.double()), torch.finfo(torch.bfloat16).eps
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    detail = f"max error {error:.1e} (limit {limit:.1e}) on {where}"
    yield Result(
        "matmul-bf16", "pass" if error <= limit else "fail", detail, "" if error <= limit else install_command("torch")
    )


def llama31_frequencies(head_dim: int, theta: float, scaling: dict[str, float]) -> list[float]:
    """Llama 3.1's rotary frequencies, written from Meta's formula alone.

    Wavelengths below original/high_freq_factor stay, those above original/low_freq_factor are divided by `factor`,
    between the two the frequencies are mixed linearly in original/wavelength.
    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling).
    """
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    original = scaling["original_max_position_embeddings"]
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


LLAMA31_ROPE: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def rope() -> Iterator[Result]:
    """Llama-3.1-8B's rope fields (theta 5e5, head_dim 128) through transformers' config into its live module."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # As the published config.json has them; transformers 5 moves them into rope_parameters itself.
    config = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dict(LLAMA31_ROPE),
    )
    live = LlamaRotaryEmbedding(config=config).inv_freq
    scaling = {key: value for key, value in LLAMA31_ROPE.items() if key != "rope_type"}
    reference = torch.tensor(llama31_frequencies(128, 500000.0, scaling), dtype=torch.float64)
    if live.shape != reference.shape:
        yield Result(
            "rope-llama31", "fail", f"{live.numel()} frequencies instead of 64", install_command("transformers")
        )
        return
    error, limit = float(((live.double() - reference) / reference).abs().max()), 8 * torch.finfo(torch.float32).eps
    detail = f"64 frequencies, max relative error {error:.1e} (limit {limit:.1e})"
    yield Result(
        "rope-llama31",
        "pass" if error <= limit else "fail",
        detail,
        "" if error <= limit else install_command("transformers"),
    )


CHECKS = {"matmul-bf16": matmul, "rope-llama31": rope}
