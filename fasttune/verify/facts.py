"""Facts of this machine, every installed package against the stack's pins, the version rules: the standard library
only, read in verify's own process. In child processes: each package imported alone, and with --online the hub.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from fasttune import gpus, stack
from fasttune.hardware import Hardware
from fasttune.verify import PIP, Result, judged, version_rules

# SmolLM2-135M in float32 peaks at 2.9 to 3.4 GiB, 1.8 with recomputation (benchmarks/results/smollm2-135m-gsm8k.jsonl,
# forecast-error.jsonl); the system needs some, too.
LEAST_MEMORY_GIB = 5
LEAST_DISK_GIB = 2
WANTED_DISK_GIB = 20  # one 8B model in bf16 is 15 GiB
LEAST_CAPABILITY = (8, 0)  # bf16 and Flash Attention 2
SHOWN_MISMATCHES = 6
GATED = "meta-llama/Llama-3.1-8B"  # what the H100 configs train
TIMEOUT_S = 10
# module → something in it that a lazy package would otherwise leave unloaded. What others are built on comes first:
# all are imported in one process, and a complaint must stand at the one that it is about. unsloth: see parity.py.
MODULES = {
    "numpy": "linalg",
    "tokenizers": "Tokenizer",
    "triton": "language",
    "torch": "nn",
    "torchvision": "ops",
    "torchao": "quantization",
    "bitsandbytes": "functional",
    "flash_attn": "flash_attn_func",
    "datasets": "Dataset",
    "accelerate": "Accelerator",
    "transformers": "LlamaForCausalLM",
    "peft": "LoraConfig",
    "trl": "SFTTrainer",
}


def read(hardware: Hardware, stack_name: str) -> Iterator[Result]:
    """All facts, in the order of the table."""
    yield python()
    yield operating_system(hardware)
    yield driver(hardware)
    yield gpu(hardware)
    yield compiler(hardware)
    installed = stack.installed()
    yield flash_attention_3(hardware, installed)
    yield memory(hardware)
    yield disk(hardware)
    yield site_packages(stack_name)
    yield pins(stack_name, installed)
    yield from version_rules.results(stack_name, installed, hardware)


def python() -> Result:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        fix = "bash scripts/setup_h100.sh --recreate"
        return Result("python", "fail", f"{version}, but the stacks are made for 3.11 to 3.13", fix)
    if sys.prefix == sys.base_prefix:
        detail = f"{version}, not in a virtual environment: other packages may fight the stack"
        return Result("python", "warn", detail, "bash scripts/setup_h100.sh")
    return Result("python", "pass", f"{version} in {sys.prefix}")


def operating_system(hardware: Hardware) -> Result:
    system = f"{hardware.os} {hardware.arch}, glibc {hardware.glibc or 'none'}"
    glibc = tuple(int(part) for part in (hardware.glibc or "0").split(".")[:2])
    ok = hardware.os.lower() == "linux" and hardware.arch == "x86_64" and glibc >= (2, 28)
    fix = "use 64-bit x86 Linux with glibc 2.28 or newer (Ubuntu 20.04, Debian 11 or later)"
    return judged("os", ok, f"{system}, {hardware.cores} cores, {hardware.cpu_model}", fix)


def driver(hardware: Hardware) -> Result:
    """Where none answers: there is no GPU, its driver is not installed or not in this container, or it is broken."""
    if hardware.driver is not None:
        ok = (hardware.driver_major or 0) >= stack.OLDEST_DRIVER
        fix = f"update it to 580 or newer ({stack.DRIVERS_URL}), then: bash scripts/setup_h100.sh"
        detail = hardware.driver if ok else f"{hardware.driver}, {stack.OLDEST_DRIVER} is needed"
        return judged("driver", ok, detail, fix)
    said = gpus.nvidia_smi_error()
    fix = "install NVIDIA driver 580 or newer (in a container: start it with --gpus all), then: nvidia-smi"
    if "version mismatch" in said:  # the driver was upgraded, the kernel still runs the old one
        fix = "reboot, so that the upgraded driver is loaded (in a container: the host), then: nvidia-smi"
    if hardware.silent_gpu:
        what = f"says: {said[:150]}" if said else "does not answer"
        return Result("driver", "fail", f"an NVIDIA chip is on the PCI bus, but nvidia-smi {what}", fix)
    if said:
        return Result("driver", "warn", f"no GPU can be used, nvidia-smi says: {said[:150]}", fix)
    return Result("driver", "skip", "no NVIDIA driver answers (nvidia-smi)")


def gpu(hardware: Hardware) -> Result:
    if not hardware.gpus:
        why = "none" if hardware.driver is None else f"{gpus.VISIBLE} hides it"
        return Result("gpu", "skip", f"{why}: everything runs on the CPU, in float32 and slowly")
    names = ", ".join(
        f"{gpu.name} ({gpu.memory_gib:.0f} GiB, compute capability {'.'.join(map(str, gpu.compute_capability))})"
        for gpu in hardware.gpus
    )
    if any(gpu.compute_capability < LEAST_CAPABILITY for gpu in hardware.gpus):
        fix = "use an Ampere or newer GPU (A100, H100 …)"
        return Result("gpu", "fail", f"{names}; bf16 and Flash Attention need 8.0", fix)
    return Result("gpu", "pass", "; ".join([names, *filter(None, map(gpus.capped, hardware.gpus))]))


def compiler(hardware: Hardware) -> Result:
    if not hardware.gpus:
        return Result("compiler", "skip", "no GPU to compile kernels for")
    if lacks := gpus.triton_lacks():
        return Result("compiler", "fail", f"Triton compiles at the first step of a run and needs {lacks[0]}", lacks[1])
    return Result("compiler", "pass", "a C compiler and Python's headers are there, for Triton")


def flash_attention_3(hardware: Hardware, installed: Mapping[str, str]) -> Result:
    """Whether Unsloth will take it (unsloth/utils/flash_impl.py); that it is right, attention:flash-attn-3 shows."""
    name = "flash-attention-3"
    if find_spec("flash_attn_interface") is None:
        if find_spec("flash_attn_3") is None:
            return Result(name, "skip", "not installed: packs run the Flash Attention 2 inside PyTorch")
        said = "flash_attn_3 is there, but not flash_attn_interface, by which Unsloth finds it"
        return Result(name, "warn", said, "reinstall it, as docs/compatibility.md says")
    if not any(gpu.compute_capability[0] == 9 for gpu in hardware.gpus):
        return Result(name, "skip", "installed, and used on an H100 or H200 only")
    if "flash-attn" in installed:
        said = f"installed, but Unsloth takes flash-attn {installed['flash-attn']} first"
        return Result(name, "warn", said, f"{PIP} uninstall -y flash-attn")
    return Result(name, "pass", "Unsloth takes it for packs, in models of hidden size 2,048 and more")


def memory(hardware: Hardware) -> Result:
    detail = f"{hardware.memory_gib:.1f} GiB"
    if hardware.memory_gib < LEAST_MEMORY_GIB:
        fix = f"use a machine with {LEAST_MEMORY_GIB} GiB or more, or train.gradient_checkpointing=full"
        return Result("memory", "warn", f"{detail}; the quickstart needs {LEAST_MEMORY_GIB} GiB", fix)
    return Result("memory", "pass", detail)


def disk(hardware: Hardware) -> Result:
    detail = f"{hardware.disk_free_gib:.1f} GiB free in the current folder"
    if LEAST_DISK_GIB <= hardware.disk_free_gib < WANTED_DISK_GIB:
        fix = "free some space, or set HF_HOME and output_dir to a larger disk"
        return Result("disk", "warn", f"{detail}; an 8B model in bf16 and its run take {WANTED_DISK_GIB} GiB", fix)
    fix = f"free at least {LEAST_DISK_GIB} GiB: du -xh --max-depth=1 . | sort -h | tail"
    return judged("disk", hardware.disk_free_gib >= WANTED_DISK_GIB, detail, fix)


def site_packages(stack_name: str) -> Result:
    """Every pinned package is there once, whole, and in this environment: what pip cannot fix."""
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
        if not stack.compare({name: wanted[name]}, {name: version}):
            continue
        if folder.parent.resolve() in on_pythonpath:
            outside.append(f"{name} {version} comes from {folder.parent} (PYTHONPATH)")
        elif folder.suffix == ".dist-info" and not (folder / "RECORD").is_file():
            damaged.append(f"{name} {version} has lost its RECORD, so pip cannot replace it")
    if outside:
        return Result("site-packages", "fail", "; ".join(outside[:3]), "unset PYTHONPATH, then run verify again")
    if damaged:
        return Result("site-packages", "fail", "; ".join(damaged[:3]), version_rules.RECREATE)
    return Result("site-packages", "pass", "every package is there once, and in this environment")


def pins(stack_name: str, installed: Mapping[str, str]) -> Result:
    """Every package of the stack file against what is installed, by exact version."""
    wanted = stack.read_pins(stack_name)
    wrong = stack.compare(wanted, installed)
    if not wrong:
        return Result("pins", "pass", f"{len(wanted)} packages as stacks/{stack_name}.txt pins them")
    shown = [f"{item.name} {item.installed or 'missing'} (pinned {item.pinned})" for item in wrong[:SHOWN_MISMATCHES]]
    more = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
    fix = stack.fix_mismatches(wrong, stack_name)
    return Result("pins", "fail", f"{len(wrong)} of {len(wanted)} differ: {', '.join(shown)}{more}", fix)


# -- in child processes


def import_one(module_name: str) -> Iterator[Result]:
    """One package of the stack, deep enough that a lazy one really loads what fasttune uses."""
    name, distribution, part = f"import:{module_name}", stack.canonical(module_name), MODULES[module_name]
    if find_spec(module_name) is None:
        stack_name = stack.active_stack()
        if distribution in stack.read_pins(stack_name):
            yield judged(name, False, "is not installed", reinstall=(distribution,))
        else:
            yield Result(name, "skip", f"not in stack {stack_name}")
        return
    module = importlib.import_module(module_name)
    if not hasattr(module, part):
        importlib.import_module(f"{module_name}.{part}")
    yield Result(name, "pass", str(getattr(module, "__version__", importlib.metadata.version(distribution))))


def online() -> Iterator[Result]:
    """Is the hub there, is the token good, may it read Llama. The token itself is never printed."""
    import httpx
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    fix = f"curl -I {constants.ENDPOINT}  # then: proxy (HTTPS_PROXY), DNS, firewall"
    try:
        answer = httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S, follow_redirects=True)
        said = f"{constants.ENDPOINT} answers {answer.status_code} in {answer.elapsed.total_seconds():.1f} s"
        yield judged("online:hub", answer.status_code < 400, said, fix)
    except httpx.HTTPError as error:
        yield Result("online:hub", "fail", f"{constants.ENDPOINT} cannot be reached: {type(error).__name__}", fix)
    if not get_token():
        yield Result("online:token", "warn", "no token: gated models such as Llama cannot be loaded", "hf auth login")
        return
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
    try:
        name = HfApi().whoami()["name"]
    except HfHubHTTPError as error:
        fix = "unset HF_TOKEN; hf auth login  # with a new token of your account"
        yield Result("online:token", "fail", f"the token of {where} is refused ({error.response.status_code})", fix)
        return
    yield Result("online:token", "pass", f"the token of {where} is valid (user {name})")
    try:
        HfApi().auth_check(GATED)
        yield Result("online:llama", "pass", f"{name} may read {GATED}")
    except HfHubHTTPError as error:
        fix = f"accept its licence on https://huggingface.co/{GATED}"
        yield Result("online:llama", "warn", f"{name} may not read {GATED} ({error.response.status_code})", fix)


CHECKS = {"online:token": online} | {f"import:{name}": partial(import_one, name) for name in MODULES}
