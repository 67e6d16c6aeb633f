#!/usr/bin/env python3
"""What FP8 matmuls of the frozen weights would bring:  python benchmarks/fp8.py bf16|fp8 CONFIG [key=value …]

An experiment, no setting: trains like `fasttune train`, and with `fp8` every matmul with a frozen layer weight, forward
and for the input's gradient, takes both sides in e4m3 with one scale a row, result in bf16. Adapters, attention, head
and optimizer stay as they are. Run it once each way and lay the losses and speeds beside each other; its first part,
the same in both, is the rate of both kinds of matmul at the shapes of Llama-3.1-8B, quantizing included.
The last line of stdout is a JSON document. On a CPU the arithmetic is imitated, for a trial of the code only.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ceilings import LAYERS, TOKENS
from torch.utils._python_dispatch import TorchDispatchMode

from fasttune import config as configuration, gpus, hardware, terminal
from fasttune.core import prepare

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
LEAST_WIDTH = 1024  # of a weight, on a GPU: quantizing costs more than it brings for narrow ones
WARMUP_STEPS = 2


class Fp8Matmuls(TorchDispatchMode):
    """Takes over aten's matmuls whose second factor is a frozen layer weight or its transpose.

    Two e4m3 copies of each such weight are kept, one with a scale a row and one with a scale a column: a byte each way.
    """

    def __init__(self, model: Any, least: int):
        super().__init__()
        self.weights = {
            weight.data_ptr(): weight
            for name, weight in model.named_parameters()
            if not weight.requires_grad and weight.ndim == 2 and min(weight.shape) >= least and ".layers." in name
        }
        self.copies: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
        self.last: tuple[Any, ...] = (None,)
        self.taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.mm.out) and args[1].data_ptr() in self.weights:
            made = self.matmul(*args)
            return kwargs["out"].copy_(made) if "out" in kwargs else made
        plain = all(kwargs.get(factor, 1) == 1 for factor in ("alpha", "beta"))
        if func is aten.addmm_.default and args[2].data_ptr() in self.weights and plain:
            return args[0].add_(self.matmul(args[1], args[2]))
        return func(*args, **kwargs)

    def matmul(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """(M, K) @ (K, N): factor is a weight's transpose in the forward, the weight itself in the backward."""
        self.taken += 1
        forward = factor.stride(0) == 1
        key = (factor.data_ptr(), forward)
        if key not in self.copies:
            self.copies[key] = quantize(factor.t().contiguous())  # (N, K), a scale for each of N
        b, b_scale = self.copies[key]
        seen = (x.data_ptr(), x._version, x.shape, x.stride())
        if self.last[0] != seen:  # q, k and v read the same x, and so do gate and up
            self.last = (seen, x, *quantize(x))
        a, a_scale = self.last[2:]
        return scaled_matmul(a, b, a_scale, b_scale, fast=forward)


def scaled_matmul(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, fast: bool) -> Any:
    """(M, K) @ (N, K)ᵀ in bf16, of e4m3 with scales (M, 1) and (N, 1)."""
    if a.device.type == "cpu":
        return ((a.float() * a_scale) @ (b.float() * b_scale).t()).bfloat16()
    return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) in e4m3 and (M, 1) float32, with x ≈ their product."""
    if x.device.type == "cpu":
        scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
        return (x.float() / scale).to(E4M3), scale
    from fp8_kernel import quantize_rows  # a CPU has no Triton

    x = x.contiguous()
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    block = 1 << (x.shape[1] - 1).bit_length()
    quantize_rows[(x.shape[0],)](x, out, scale, x.shape[1], BLOCK=block, num_warps=8)
    return out, scale


def rates() -> dict[str, dict[str, float]]:
    """A shape's milliseconds: bf16, e4m3, and quantizing its input. And the error of e4m3, as a share of the norm."""
    found = {}
    for name, (k, n) in LAYERS.items():
        if name == "square":
            continue
        x = torch.randn(TOKENS, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        a, b = quantize(x), quantize(w)
        plain = x @ w.t()
        error = (scaled_matmul(a[0], b[0], a[1], b[1], True) - plain).float().norm() / plain.float().norm()
        times = {
            "bf16": lambda x=x, w=w: x @ w.t(),
            "e4m3": lambda a=a, b=b: scaled_matmul(a[0], b[0], a[1], b[1], True),
            "e4m3, slow sums": lambda a=a, b=b: scaled_matmul(a[0], b[0], a[1], b[1], False),
            "quantizing": lambda x=x: quantize(x),
        }
        found[name] = {what: round(1e3 * hardware.median_s(run, 0.3), 4) for what, run in times.items()}
        found[name]["error"] = round(float(error), 5)
    return found


def main() -> int:
    kind, *rest = sys.argv[1:]
    config = configuration.load(Path(rest[0]), rest[1:])
    gpus.pin()
    on_gpu = torch.cuda.is_available()
    measured = rates() if on_gpu else {}
    print(json.dumps(measured), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare.prepare(config, Path(scratch) / "run", terminal.Reporter(quiet=True))
        import transformers

        from fasttune.core import trainer as trainers, what_ran

        trainer = trainers.build(job, Path(scratch))
        mode = Fp8Matmuls(job.model, LEAST_WIDTH if on_gpu else 1)
        plain_step, seconds, losses = trainer.training_step, [], []

        def fp8_step(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return plain_step(*args, **kwargs)

        if kind == "fp8":
            trainer.training_step = fp8_step

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                what_ran.synchronize()
                self.began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                what_ran.synchronize()
                seconds.append(time.perf_counter() - self.began)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    losses.append({"loss": float(logs["loss"]), "grad_norm": float(logs.get("grad_norm", 0))})

        trainer.add_callback(Clock())
        tokens = []
        batches = trainer.get_batch_samples

        def counted(*args: Any, **kwargs: Any) -> Any:
            made = batches(*args, **kwargs)
            tokens.append(trainer.counts["tokens"])
            return made

        trainer.get_batch_samples = counted
        trainer.train()
        steady = slice(WARMUP_STEPS, None)
        result = {
            "kind": kind,
            "device": hardware.machine_name(job.machine),
            "backend": vars(what_ran.backend(trainer)),
            "matmuls_taken": mode.taken,
            "losses": losses,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": sum(tokens[steady]) / sum(seconds[steady]),
            "peak_memory_gib": what_ran.peak_memory_gib(),
            "rates_ms": measured,
        }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
