"""Facts of this machine, every installed package against the stack's pins, and the version rules. Imports no torch."""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from fasttune import gpus, hardware as machines, stack
from fasttune.hardware import Hardware
from fasttune.verify import Result, Status
from fasttune.verify.version_rules import PIP, RULES

# SmolLM2-135M in float32 peaks at 2.9 to 3.4 GiB, 1.8 with recomputation (benchmarks/results/smollm2-135m-gsm8k.jsonl,
# forecast-error.jsonl); the system needs some, too.
LEAST_MEMORY_GIB = 5
LEAST_DISK_GIB = 2
WANTED_DISK_GIB = 20  # one 8B model in bf16 is 15 GiB
LEAST_CAPABILITY = (8, 0)  # bf16 and Flash Attention 2
SHOWN_MISMATCHES = 6


def check(hardware: Hardware, stack_name: str) -> Iterator[Result]:
    """All facts, in the order of the table."""
    yield python()
    yield operating_system(hardware)
    yield from gpu(hardware)
    yield compiler(hardware)
    installed = stack.installed()
    yield flash_attention_3(hardware, installed)
    yield memory(hardware)
    yield disk(hardware)
    yield site_packages(stack_name)
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
    if hardware.driver is None:
        yield silent_driver(hardware)
    elif (hardware.driver_major or 0) < stack.OLDEST_DRIVER:
        fix = f"update it to 580 or newer ({stack.DRIVERS_URL}), then: bash scripts/setup_h100.sh"
        yield Result("driver", "fail", f"{hardware.driver}, {stack.OLDEST_DRIVER} is needed", fix)
    else:
        yield Result("driver", "pass", hardware.driver)
    if not hardware.gpus:
        why = "none" if hardware.driver is None else f"{gpus.VISIBLE} hides it"
        yield Result("gpu", "skip", f"{why}: everything runs on the CPU, in float32 and slowly")
        return
    names = ", ".join(
        f"{gpu.name} ({gpu.memory_gib:.0f} GiB, compute capability {'.'.join(map(str, gpu.compute_capability))})"
        for gpu in hardware.gpus
    )
    if any(gpu.compute_capability < LEAST_CAPABILITY for gpu in hardware.gpus):
        yield Result(
            "gpu", "fail", f"{names}; bf16 and Flash Attention need 8.0", "use an Ampere or newer GPU (A100, H100 …)"
        )
    else:
        yield Result("gpu", "pass", "; ".join([names, *filter(None, map(gpus.capped, hardware.gpus))]))


def compiler(hardware: Hardware) -> Result:
    if not hardware.gpus:
        return Result("compiler", "skip", "no GPU to compile kernels for")
    if lacks := machines.triton_lacks():
        return Result("compiler", "fail", f"Triton compiles at the first step of a run and needs {lacks[0]}", lacks[1])
    return Result("compiler", "pass", "a C compiler and Python's headers are there, for Triton")


def flash_attention_3(hardware: Hardware, installed: Mapping[str, str]) -> Result:
    """Whether Unsloth will take it (unsloth/utils/flash_impl.py); that it is right, attention:flash-attn-3 shows."""
    name = "flash-attention-3"
    if find_spec("flash_attn_interface") is None:
        if find_spec("flash_attn_3") is None:
            return Result(name, "skip", "not installed: packs run the Flash Attention 2 inside PyTorch")
        said = "flash_attn_3 is there, but not flash_attn_interface, by which Unsloth finds it"
        return Result(name, "warn", said, "install it anew, as docs/compatibility.md says")
    if not any(gpu.compute_capability[0] == 9 for gpu in hardware.gpus):
        return Result(name, "skip", "installed, and used on an H100 or H200 only")
    if "flash-attn" in installed:
        said = f"installed, but Unsloth takes flash-attn {installed['flash-attn']} first"
        return Result(name, "warn", said, f"{PIP} uninstall -y flash-attn")
    return Result(name, "pass", "Unsloth takes it for packs, in models of hidden size 2,048 and more")


def silent_driver(hardware: Hardware) -> Result:
    """No GPU to be used: there is none, its driver is not installed or not in this container, or it is broken."""
    said = machines.nvidia_smi_error()
    fix = "install NVIDIA driver 580 or newer (in a container: start it with --gpus all), then: nvidia-smi"
    if "version mismatch" in said:  # the driver was upgraded, the kernel still runs the old one
        fix = "reboot, so that the upgraded driver is loaded (in a container: the host), then: nvidia-smi"
    if hardware.silent_gpu:
        what = f"says: {said[:150]}" if said else "does not answer"
        return Result("driver", "fail", f"an NVIDIA chip is on the PCI bus, but nvidia-smi {what}", fix)
    if said:
        return Result("driver", "warn", f"no GPU can be used, nvidia-smi says: {said[:150]}", fix)
    return Result("driver", "skip", "no NVIDIA driver answers (nvidia-smi)")


def memory(hardware: Hardware) -> Result:
    detail = f"{hardware.memory_gib:.1f} GiB"
    if hardware.memory_gib < LEAST_MEMORY_GIB:
        fix = f"use a machine with {LEAST_MEMORY_GIB} GiB or more, or train.gradient_checkpointing=full"
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


def site_packages(stack_name: str) -> Result:
    """Every pinned package is there once, whole, and in this environment: what pip cannot mend."""
    wanted, seen = stack.read_pins(stack_name), dict[str, tuple[str, Path]]()
    damaged, outside = list[str](), list[str]()
    on_pythonpath = {Path(place).resolve() for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place}
    for name, version, distribution in stack.distributions():
        if name not in wanted:
            continue
        folder = stack.metadata_folder(distribution)
        if name in seen:  # behind another one of its kind Python does not see it, in the same folder it may
            if folder.parent == seen[name][1] and version != seen[name][0]:
                damaged.append(f"{name} is there twice, {seen[name][0]} and {version}")
            continue
        seen[name] = (version, folder.parent)
        differs = bool(stack.compare({name: wanted[name]}, {name: version}))
        if differs and folder.parent.resolve() in on_pythonpath:
            outside.append(f"{name} {version} comes from {folder.parent} (PYTHONPATH)")
        elif differs and folder.suffix == ".dist-info" and not (folder / "RECORD").is_file():
            damaged.append(f"{name} {version} has lost its RECORD, so pip cannot replace it")
    if outside:
        return Result("site-packages", "fail", "; ".join(outside[:3]), "unset PYTHONPATH, then run verify again")
    if damaged:
        return Result("site-packages", "fail", "; ".join(damaged[:3]), "bash scripts/setup_h100.sh --recreate")
    return Result("site-packages", "pass", "every package is there once, and in this environment")


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
        name = f"rule:{rule.name}"
        try:
            wrong = rule.check(installed, hardware)
        except ImportError as error:  # `packaging` reads what packages declare to need
            fix = stack.repair_command(["packaging"], stack_name)
            yield Result(name, "fail", f"cannot be judged: {error}", fix)
            continue
        if wrong is None:
            yield Result(name, "pass", rule.reason)
        else:
            status: Status = "warn" if rule.severity == "warn" else "fail"
            yield Result(name, status, f"{wrong}: {rule.reason} ({rule.source})", rule.fix(stack_name))
