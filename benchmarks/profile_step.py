#!/usr/bin/env python3
"""Where a training step's time goes, kernel by kernel:  python benchmarks/profile_step.py CONFIG [key=value …]

Trains as `fasttune train` does; the last of `train.max_steps` steps is profiled. Prints the milliseconds of each group
of kernels (on a CPU, of torch's operators) and the longest of them; the last line of stdout is a JSON document.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fasttune import config as configuration, gpus, hardware, terminal
from fasttune.core import prepare

GROUPS = {  # the first name that a kernel's own holds
    "attention": ("flash", "fmha", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "wgmma", "xmma", "cublas"),
    "cross entropy": ("cross_entropy",),
    "norm, rope, swiglu": ("rms", "layernorm", "rope", "_fg_kernel", "_dwf_dw_dfg"),
    "compiled blocks": ("triton_",),
    "optimizer": ("adam", "multi_tensor", "lpnorm"),
    "copies": ("memcpy", "memset", "copy_kernel", "bfloat16_copy", "catarray"),
}
CPU_GROUPS = {
    "attention": ("rowsattention", "bmm", "addmm_", "softmax", "masked_fill", "scaled_dot"),  # no other batched matmuls
    "matmul": ("aten::mm", "aten::addmm", "aten::linear"),
    "LoRA beside its matmuls": ("fusedlora",),
    "elementwise": (
        "aten::mul",
        "aten::add",
        "aten::sub",
        "aten::div",
        "silu",
        "aten::pow",
        "rsqrt",
        "aten::neg",
        "exp",
    ),
    "optimizer": ("adam", "foreach", "norm"),
    "copies": ("copy", "clone", "aten::cat", "fill", "zero"),
}
LONGEST = 25


def main() -> int:
    config = configuration.load(Path(sys.argv[1]), sys.argv[2:])
    gpus.pin()
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare.prepare(config, Path(scratch) / "run", terminal.Reporter(quiet=True))
        for warning in job.warnings:
            print(f"warning: {warning}")
        import torch
        import transformers

        from fasttune.core import trainer as trainers, what_ran

        on_gpu = torch.cuda.is_available()
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU

        trainer = trainers.build(job, Path(scratch))
        steps: list[dict[str, Any]] = []

        class Profiled(transformers.TrainerCallback):
            """Seconds of every step, and the kernels of the last."""

            def __init__(self) -> None:
                self.profile: Any = None
                self.seconds: list[float] = []

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                what_ran.restart_peak()  # loading is none of the steps

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == job.total_steps - 1:
                    self.profile = torch.profiler.profile(activities=[activity])
                    self.profile.start()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                what_ran.synchronize()
                self.seconds.append(time.perf_counter() - trainer.started)
                if self.profile is not None:
                    self.profile.stop()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    steps.append(trainer.counts | {"loss": float(logs["loss"])})

        profiled = Profiled()
        trainer.add_callback(profiled)
        trainer.train()
        time_us = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        kernels = {event.key: getattr(event, time_us) / 1e3 for event in profiled.profile.key_averages()}
        result = {
            "device": hardware.machine_name(job.machine),
            "backend": vars(what_ran.backend(trainer)),
            "steps": [step | {"seconds": s} for step, s in zip(steps, profiled.seconds, strict=True)],
            "peak_memory_gib": what_ran.peak_memory_gib(),
            "groups_ms": grouped(kernels, GROUPS if on_gpu else CPU_GROUPS),
            "kernels_ms": dict(sorted(kernels.items(), key=lambda item: -item[1])[:LONGEST]),
        }
    for name, ms in {**result["groups_ms"], "": 0.0, **result["kernels_ms"]}.items():
        print(f"{ms:10.2f}  {name[:150]}")
    print(json.dumps(result))
    return 0


def grouped(kernels: dict[str, float], groups: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Milliseconds of each group, the longest first."""
    total: dict[str, float] = {}
    for kernel, ms in kernels.items():
        lower = kernel.lower()
        group = next((name for name, parts in groups.items() if any(part in lower for part in parts)), "other")
        total[group] = total.get(group, 0.0) + ms
    return dict(sorted(total.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    sys.exit(main())
