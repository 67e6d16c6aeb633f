#!/usr/bin/env python3
"""What the chip itself can do, on random data (zeros draw less power and clock higher): python benchmarks/ceilings.py

copy       device-to-device, GB/s counting bytes read and bytes written
matmul     TFLOP/s at 8192³ and at the shapes of Llama-3.1-8B's layers with 8,192 tokens at once
attention  TFLOP/s of causal attention, forward and backward, by each of PyTorch's kernels

Medians of synchronised repeats. The last line of stdout is a JSON document. --tiny: small shapes, for a CPU.
"""

import argparse
import json
import sys

import torch

from fasttune.hardware import measure_matmul_tflops, median_s

SECONDS = 2.0  # of each measurement
COPY_BYTES = 8 * 2**30
TOKENS = 8192
LAYERS = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
LAYERS |= {"lm_head": (4096, 128256), "square": (8192, 8192)}
BATCH, HEADS, LENGTH, WIDTH = 2, 32, 4096, 128  # Llama-3.1-8B's heads (keys and values repeated), 8,192 tokens
BACKWARD = 2.5  # times the forward's FLOPs: https://arxiv.org/abs/2307.08691, section 4.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    shrink, seconds = (64, 0.05) if tiny else (1, SECONDS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_gb_per_s": copy(device, COPY_BYTES // shrink**2, seconds),
        "matmul_tflops": matmul(device, shrink, seconds),
        "attention_tflops": attention(device, LENGTH // shrink, seconds),
    }
    print(json.dumps(result))
    return 0


def copy(device: str, size: int, seconds: float) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_s(lambda: target.copy_(source), seconds) / 1e9


def matmul(device: str, shrink: int, seconds: float) -> dict[str, float]:
    shapes = {name: (TOKENS // shrink, k // shrink, n // shrink) for name, (k, n) in LAYERS.items()}
    rates = measure_matmul_tflops(device, "bfloat16", list(shapes.values()), seconds * len(shapes))
    return {f"{name} {' x '.join(map(str, shape))}": rates[shape] for name, shape in shapes.items()}


def attention(device: str, length: int, seconds: float) -> dict[str, float | str]:
    """By kernel: TFLOP/s, or why it does not run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (BATCH, HEADS, length, WIDTH)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)
    flops = (1 + BACKWARD) * 4 * BATCH * HEADS * length**2 * WIDTH / 2  # causal: half of the square
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kernels["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    found: dict[str, float | str] = {}

    def step() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    for name, kernel in kernels.items():
        try:
            with sdpa_kernel(kernel):
                found[name] = flops / median_s(step, seconds) / 1e12
        except RuntimeError as error:
            found[name] = f"does not run: {str(error).splitlines()[0]}"
    return found


if __name__ == "__main__":
    sys.exit(main())
