"""Rules for people who come with another stack, as data: what belongs together, why, by which source, and the remedy.

A rule reads versions, metadata and hardware; it never imports the package: a broken one would take the check down too.
"""

import functools
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fasttune.hardware import Hardware
from fasttune.stack import (
    OLDEST_DRIVER,
    canonical,
    compare,
    distributions,
    fix_command,
    installed,
    read_pins,
    repair_command,
)

Versions = Mapping[str, str]  # canonical name → version, as stack.installed() gives it


@dataclass(frozen=True)
class Rule:
    """What belongs together: `check` says what is wrong, or None; `fix(stack)` is the command that mends it."""

    name: str
    reason: str
    source: str
    packages: tuple[str, ...]  # fix() puts these to the pins of the stack
    check: Callable[[Versions, Hardware], str | None]
    remedy: str | None = None  # what to do instead of installing the pins
    severity: str = "fail"  # or "warn": slower or noisier, but correct

    def fix(self, stack: str) -> str:
        """Puts what differs to the stack's pins and removes what the stack does without."""
        if self.remedy:
            return self.remedy
        pins, versions = read_pins(stack), installed()
        needless = [name for name in self.packages if name not in pins and name in versions]
        wrong = compare({name: pins[name] for name in self.packages if name in pins}, versions)
        commands = [repair_command([item.name for item in wrong], stack)] if wrong else []
        commands += [f"{PIP} uninstall -y {' '.join(needless)}"] if needless else []
        return " && ".join(commands) or RECREATE  # all as pinned: a package from outside the stack does not fit


def release(version: str) -> tuple[int, ...]:
    """The leading numbers, `2.11.0+cu130` → (2, 11, 0): enough to order the releases named here."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def cuda_of(torch: str) -> int | None:
    """The CUDA major version of a torch build, `2.11.0+cu130` → 13; None where the version does not say."""
    match = re.search(r"\+cu(\d+)\d$", torch)
    return int(match[1]) if match else None


def unmet(package: str, installed: Versions, among: tuple[str, ...] = ()) -> list[str]:
    """What an installed package declares to need (of `among`, or all) and the installed version is not.

    Packages that are missing are passed over: the CPU stack leaves some out on purpose.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for line in requires(package) if package in installed else []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        name = canonical(requirement.name)
        if name == "certifi" or (among and name not in among):  # certifi: see stacks/regenerate.py
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed.get(name)
        if version and not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{package} {installed[package]} needs {name}{requirement.specifier}, {version} is installed")
    return found


def requires(package: str) -> list[str]:
    """What an installed package declares to need, `name<2; marker` a line."""
    return _all_requires().get(package, [])


@functools.cache
def _all_requires() -> dict[str, list[str]]:
    """Of all packages at once: importlib.metadata would look through the folder and parse the file for each."""
    found: dict[str, list[str]] = {}
    for name, _, distribution in distributions():
        head = (distribution.read_text("METADATA") or "").partition("\n\n")[0]
        found.setdefault(name, re.findall(r"^Requires-Dist: *(.+)", head, re.M))
    return found


def _declared(*packages: str, among: tuple[str, ...] = ()) -> Callable[[Versions, Hardware], str | None]:
    def check(installed: Versions, hardware: Hardware) -> str | None:
        found = dict.fromkeys(text for package in packages for text in unmet(package, installed, among))
        return "; ".join(found) or None

    return check


def _llama31(installed: Versions, hardware: Hardware) -> str | None:
    version = installed.get("transformers")
    return f"transformers {version} is older than 4.43" if version and release(version) < (4, 43) else None


# The first release of each that works with numpy 2: https://github.com/numpy/numpy/issues/26191
# torch: https://github.com/pytorch/pytorch/issues/107302
FIRST_FOR_NUMPY_2 = {
    "torch": (2, 3),
    "pandas": (2, 2, 2),
    "pyarrow": (16,),
    "matplotlib": (3, 9),
    "contourpy": (1, 2, 1),
    "scipy": (1, 13),
    "scikit-learn": (1, 4, 2),
}


def _numpy(installed: Versions, hardware: Hardware) -> str | None:
    version = installed.get("numpy", "")
    if release(version) >= (2,):
        for name, first in FIRST_FOR_NUMPY_2.items():
            if name in installed and release(installed[name]) < first:
                return f"{name} {installed[name]} was built for numpy 1, numpy {version} is installed"
    for name in installed:
        if name != "fasttune" and (problems := unmet(name, installed, ("numpy",))):
            return problems[0]
    return None


def _flash_attn(installed: Versions, hardware: Hardware) -> str | None:
    """Wheels of the project say in their local version what they were built for: `2.8.3+cu12torch2.8cxx11abiTRUE`."""
    wheel, torch = installed.get("flash-attn", ""), installed.get("torch", "")
    match = re.search(r"\+cu(\d\d)\d*torch(\d+\.\d+)(?:cxx11abi(true|false))?", wheel.lower())
    if not match or not torch:
        return None
    cuda, built_for, abi = match.groups()
    if release(built_for) != release(torch)[:2]:
        return f"flash-attn {wheel} was built for torch {built_for}, torch {torch} is installed"
    if cuda_of(torch) not in (None, int(cuda)):
        return f"flash-attn {wheel} was built for CUDA {cuda}, torch {torch} brings CUDA {cuda_of(torch)}"
    if abi == "false" and release(torch) >= (2, 7):  # https://github.com/pytorch/pytorch/issues/152790
        return f"flash-attn {wheel} was built for the old C++ ABI, torch {torch} uses the new one"
    return None


def _cpu_torch(installed: Versions, hardware: Hardware) -> str | None:
    torch = installed.get("torch", "")
    return f"torch {torch} cannot use the {hardware.gpus[0].name}" if hardware.gpus and "+cpu" in torch else None


def _driver_for_cuda12(installed: Versions, hardware: Hardware) -> str | None:
    """One before 525, which runs neither, fails the check `driver`."""
    torch, driver = installed.get("torch", ""), hardware.driver_major or 580
    if driver < OLDEST_DRIVER or driver >= 580 or cuda_of(torch) != 13:
        return None
    return f"torch {torch} needs driver 580, {hardware.driver} is installed"


def _cuda11_on_hopper(installed: Versions, hardware: Hardware) -> str | None:
    torch = installed.get("torch", "")
    if cuda_of(torch) == 11 and any(gpu.compute_capability >= (9, 0) for gpu in hardware.gpus):
        return f"torch {torch} on the {hardware.gpus[0].name}"
    return None


def _unsloth_on_cpu(installed: Versions, hardware: Hardware) -> str | None:
    version = installed.get("unsloth", "")
    if hardware.gpus or not version or release(version) >= (2026, 9):
        return None
    return f"unsloth {version} on a machine without a GPU"


PIP = shlex.join([sys.executable, "-m", "pip"])
RECREATE = "bash scripts/setup_h100.sh --recreate"
FLASH_ATTN_ANEW = f"{PIP} uninstall -y flash-attn && bash scripts/setup_h100.sh --flash-attn auto"
UNSLOTH_PYPROJECT = "https://github.com/unslothai/unsloth/blob/main/pyproject.toml"
HUGGING_FACE = ("transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "huggingface-hub", "safetensors")

RULES: tuple[Rule, ...] = (
    Rule(
        "llama-3.1-transformers",
        "Llama 3.1 has five-field rope_scaling, which older releases refuse"
        ' ("`rope_scaling` must be a dictionary with two fields")',
        "https://github.com/huggingface/transformers/releases/tag/v4.43.0",
        ("transformers", "tokenizers", "huggingface-hub"),
        _llama31,
    ),
    Rule(
        "unsloth-limits",
        "unsloth patches these packages' insides and declares the releases that it knows",
        UNSLOTH_PYPROJECT,
        ("torch", *HUGGING_FACE, "unsloth", "unsloth-zoo", "bitsandbytes", "xformers", "triton"),
        _declared("unsloth", "unsloth-zoo"),
    ),
    Rule(
        "hugging-face-limits",
        "transformers and its kin check each other's versions at import and stop",
        "https://github.com/huggingface/transformers/blob/main/src/transformers/dependency_versions_check.py",
        HUGGING_FACE,
        _declared("transformers", "trl", "peft", "accelerate", "datasets", among=HUGGING_FACE),
    ),
    Rule(
        "torchvision-torch",
        'each torchvision is compiled for one torch ("operator torchvision::nms does not exist")',
        "https://github.com/pytorch/vision#installation",
        ("torch", "torchvision"),
        _declared("torchvision", among=("torch",)),
    ),
    Rule(
        "triton-torch",
        "torch's compiler is made for one triton, which its CUDA build pins",
        "https://github.com/pytorch/pytorch/blob/main/RELEASE.md",
        ("torch", "triton"),
        _declared("torch", among=("triton",)),
    ),
    Rule(
        "numpy-abi",
        "packages compiled for numpy 1 crash under numpy 2, and newer ones refuse numpy 1",
        "https://numpy.org/doc/stable/dev/depending_on_numpy.html#numpy-2-0-specific-advice",
        ("numpy", "pandas", "pyarrow", "matplotlib", "contourpy", "torch"),
        _numpy,
    ),
    Rule(
        "flash-attn-torch",
        'flash-attn is compiled for one torch, CUDA and C++ ABI ("undefined symbol")',
        "https://github.com/Dao-AILab/flash-attention/issues/975",
        ("flash-attn",),
        _flash_attn,
        remedy=FLASH_ATTN_ANEW,
    ),
    Rule(
        "torch-cpu-build",
        "a CPU build of torch leaves the GPU idle",
        "https://pytorch.org/get-started/locally/",
        ("torch", "triton"),
        _cpu_torch,
        remedy=RECREATE,
    ),
    Rule(
        "driver-cuda-13",
        "CUDA 13 builds need driver 580; an older one runs the CUDA 12 builds",
        "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
        ("torch",),
        _driver_for_cuda12,
        remedy=fix_command(("torch", "torchvision"), "cu12"),
    ),
    Rule(
        "cuda-11-hopper",
        "CUDA 11.8 knows Hopper, but its libraries lack most Hopper kernels",
        "https://docs.nvidia.com/cuda/hopper-compatibility-guide/",
        ("torch",),
        _cuda11_on_hopper,
        severity="warn",
    ),
    Rule(
        "unsloth-cpu",
        "releases until about 2026.8 raise NotImplementedError without a GPU",
        "https://github.com/unslothai/unsloth/releases",
        ("unsloth", "unsloth-zoo"),
        _unsloth_on_cpu,
    ),
)
