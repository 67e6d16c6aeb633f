"""Facts of this machine, every installed package against the stack's pins, and the version rules. Imports no torch."""

import sys
from collections.abc import Iterator

from fasttune import stack
from fasttune.checks import Result, Status
from fasttune.hardware import Hardware
from fasttune.rules import RULES

LEAST_MEMORY_GIB = 7  # SmolLM2-135M in float32 peaks at 5.3 to 6.6 GiB
LEAST_DISK_GIB = 2
WANTED_DISK_GIB = 20  # one 8B model in bf16 is 15 GiB
LEAST_CAPABILITY = (8, 0)  # bf16 and Flash Attention 2
SHOWN_MISMATCHES = 6


def check(hardware: Hardware, stack_name: str) -> Iterator[Result]:
    """All facts, in the order of the table."""
    yield python()
    yield operating_system(hardware)
    yield from gpu(hardware)
    yield memory(hardware)
    yield disk(hardware)
    installed = stack.installed()
    yield pins(stack_name, installed)
    yield from rules(stack_name, installed, hardware)


def python() -> Result:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        fix = "install Python 3.12, then: bash scripts/setup_h100.sh --recreate --python python3.12"
        return Result("python", "fail", f"{version}, but the stacks are made for 3.11 to 3.13", fix)
    if sys.prefix == sys.base_prefix:
        detail = f"{version}, not in a virtual environment: other packages may fight the stack"
        return Result("python", "warn", detail, "bash scripts/setup_h100.sh")
    return Result("python", "pass", f"{version} in {sys.prefix}")


def operating_system(hardware: Hardware) -> Result:
    detail = (
        f"{hardware.os} {hardware.arch}, glibc {hardware.glibc or 'none'}, {hardware.cores} cores, {hardware.cpu_model}"
    )
    glibc = tuple(int(part) for part in (hardware.glibc or "0").split(".")[:2])
    if hardware.os.lower() != "linux" or hardware.arch != "x86_64" or glibc < (2, 28):
        fix = "use 64-bit x86 Linux with glibc 2.28 or newer (Ubuntu 20.04, Debian 11 or later)"
        return Result("os", "fail", detail, fix)
    return Result("os", "pass", detail)


def gpu(hardware: Hardware) -> Iterator[Result]:
    """`driver` and `gpu`; without a GPU both are skipped with the reason."""
    if not hardware.gpus:
        if hardware.silent_gpu:
            fix = "install NVIDIA driver 580 or newer (in a container: start it with --gpus all), then: nvidia-smi"
            yield Result("driver", "fail", "an NVIDIA chip is on the PCI bus, but nvidia-smi does not answer", fix)
        else:
            yield Result("driver", "skip", "no NVIDIA driver answers (nvidia-smi)")
        yield Result("gpu", "skip", "none: everything runs on the CPU, in float32 and slowly")
        return
    yield Result("driver", "pass", str(hardware.driver))
    names = ", ".join(
        f"{gpu.name} ({gpu.memory_gib:.0f} GiB, compute capability {'.'.join(map(str, gpu.compute_capability))})"
        for gpu in hardware.gpus
    )
    if any(gpu.compute_capability < LEAST_CAPABILITY for gpu in hardware.gpus):
        yield Result(
            "gpu", "fail", f"{names}; bf16 and Flash Attention need 8.0", "use an Ampere or newer GPU (A100, H100 …)"
        )
    elif len(hardware.gpus) > 1:
        yield Result("gpu", "warn", f"{names}; fasttune trains on one", "export CUDA_VISIBLE_DEVICES=0")
    else:
        yield Result("gpu", "pass", names)


def memory(hardware: Hardware) -> Result:
    detail = f"{hardware.memory_gib:.1f} GiB"
    if hardware.memory_gib < LEAST_MEMORY_GIB:
        fix = f"use a machine with {LEAST_MEMORY_GIB} GiB or more, or train.batch_rows=2 and model.max_length=512"
        return Result("memory", "warn", f"{detail}; the quickstart needs {LEAST_MEMORY_GIB} GiB", fix)
    return Result("memory", "pass", detail)


def disk(hardware: Hardware) -> Result:
    detail = f"{hardware.disk_free_gib:.1f} GiB free in the current folder"
    if hardware.disk_free_gib < LEAST_DISK_GIB:
        return Result(
            "disk", "fail", detail, f"free at least {LEAST_DISK_GIB} GiB: du -xh --max-depth=1 . | sort -h | tail"
        )
    if hardware.disk_free_gib < WANTED_DISK_GIB:
        fix = "free some space, or set HF_HOME and output_dir to a larger disk"
        return Result("disk", "warn", f"{detail}; an 8B model in bf16 and its run take {WANTED_DISK_GIB} GiB", fix)
    return Result("disk", "pass", detail)


def pins(stack_name: str, installed: dict[str, str]) -> Result:
    """Every package of the stack file against what is installed, by exact version."""
    wanted = stack.read_pins(stack_name)
    wrong = stack.compare(wanted, installed)
    if not wrong:
        return Result("pins", "pass", f"{len(wanted)} packages as stacks/{stack_name}.txt pins them")
    shown = [f"{item.name} {item.installed or 'missing'} (pinned {item.pinned})" for item in wrong[:SHOWN_MISMATCHES]]
    more = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
    fix = stack.fix_command([item.name for item in wrong], stack_name)
    return Result("pins", "fail", f"{len(wrong)} of {len(wanted)} differ: {', '.join(shown)}{more}", fix)


def rules(stack_name: str, installed: dict[str, str], hardware: Hardware) -> Iterator[Result]:
    """The rules of stack.py, for those who come with versions of their own."""
    for rule in RULES:
        wrong, name = rule.check(installed, hardware), f"rule:{rule.name}"
        if wrong is None:
            yield Result(name, "pass", rule.reason)
        else:
            status: Status = "warn" if rule.severity == "warn" else "fail"
            yield Result(name, status, f"{wrong}: {rule.reason} ({rule.source})", rule.fix(stack_name))
