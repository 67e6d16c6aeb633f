"""Rules for people who come with another stack, as data: what belongs together, why, by which source, and the fix.

A rule reads versions, metadata and hardware; it never imports the package: a broken one would take the check down too.
What packages declare of each other is read from their metadata; only what none of them declares stands here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from fasttune import stack
from fasttune.hardware import Hardware
from fasttune.verify import PIP, Result, install_command

Versions = Mapping[str, str]  # canonical name → version, as stack.installed() gives it
Problem = Callable[[Versions, Hardware], str | None]  # what is wrong, in words

RECREATE = "bash scripts/setup_h100.sh --recreate"
REINSTALL_FLASH_ATTN = f"{PIP} uninstall -y flash-attn && bash scripts/setup_h100.sh --flash-attn auto"
# Releases that were built for numpy 1 and do not all say so: https://github.com/numpy/numpy/issues/26191
# torch: https://github.com/pytorch/pytorch/issues/107302
BUILT_FOR_NUMPY_1 = {"torch": "<2.3", "pandas": "<2.2.2", "pyarrow": "<16", "matplotlib": "<3.9"}


@dataclass(frozen=True)
class Rule:
    """What belongs together: `problem` says what is wrong, or None."""

    name: str
    reason: str
    source: str
    packages: tuple[str, ...]  # the fix puts these to the pins of the stack
    problem: Problem
    remedy: str | None = None  # what to do instead of installing the pins
    slower_only: bool = False  # a warning: the results are right

    def fix(self, stack_name: str, installed: Versions) -> str:
        """Puts what differs to the stack's pins and removes what the stack does without."""
        if self.remedy:
            return self.remedy
        pins = stack.read_pins(stack_name)
        needless = [name for name in self.packages if name not in pins and name in installed]
        wrong = stack.compare({name: pins[name] for name in self.packages if name in pins}, installed)
        commands = [stack.repair_command([item.name for item in wrong], stack_name)] if wrong else []
        commands += [f"{PIP} uninstall -y {' '.join(needless)}"] if needless else []
        return " && ".join(commands) or RECREATE  # all as pinned: a package from outside the stack does not fit


def results(stack_name: str, installed: Versions, hardware: Hardware) -> Iterator[Result]:
    """What every rule says of this environment."""
    for rule in RULES:
        name = f"rule:{rule.name}"
        try:
            wrong = rule.problem(installed, hardware)
        except ImportError as error:
            yield Result(name, "fail", f"cannot be judged: {error}", install_command("packaging"))
            continue
        if wrong is None:
            yield Result(name, "pass", rule.reason)
        else:
            detail = f"{wrong}: {rule.reason} ({rule.source})"
            yield Result(name, "warn" if rule.slower_only else "fail", detail, rule.fix(stack_name, installed))


# -- what packages declare


def declared(by: tuple[str, ...] | None, about: tuple[str, ...] | None) -> Problem:
    """A problem where a limit is not met that a package of `by` declares for one of `about`; None: any package."""

    def problem(installed: Versions, hardware: Hardware) -> str | None:
        names = by or [name for name in installed if name != "fasttune"]
        return "; ".join(dict.fromkeys(text for name in names for text in unmet(name, installed, about))) or None

    return problem


def unmet(package: str, installed: Versions, about: tuple[str, ...] | None) -> Iterator[str]:
    """What an installed package needs and the installed version is not. Packages that are missing are skipped: the CPU
    stack leaves some out on purpose."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet

    version = installed.get(package)
    if version is None:
        return
    try:
        lines = requires(package) or []
    except PackageNotFoundError:  # its folder is of another name than its metadata
        lines = []
    if package in BUILT_FOR_NUMPY_1 and SpecifierSet(BUILT_FOR_NUMPY_1[package]).contains(version, prereleases=True):
        lines = ["numpy<2", *lines]
    for line in lines:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            continue
        name = stack.canonical(need.name)
        if name == "certifi" or (about and name not in about):  # certifi: see stacks/regenerate.py
            continue
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        if name in installed and not need.specifier.contains(installed[name], prereleases=True):
            yield f"{package} {version} needs {name}{need.specifier}, {installed[name]} is installed"


# -- what no package declares


def release(version: str) -> tuple[int, ...]:
    """The leading numbers, `2.11.0+cu130` → (2, 11, 0): enough to order the releases named here."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def cuda_of(torch: str) -> int | None:
    """The CUDA major version of a torch build, `2.11.0+cu130` → 13; None where the version does not say."""
    match = re.search(r"\+cu(\d+)\d$", torch)
    return int(match[1]) if match else None


def where(package: str, wrong: Callable[[str, Hardware], bool], words: str) -> Problem:
    """A problem where the installed version of a package is `wrong` on this machine."""

    def problem(installed: Versions, hardware: Hardware) -> str | None:
        version = installed.get(package)
        if not version or not wrong(version, hardware):
            return None
        gpu = hardware.gpus[0].name if hardware.gpus else ""
        return f"{package} {version} " + words.format(gpu=gpu, driver=hardware.driver)

    return problem


def needs_newer_driver(torch: str, hardware: Hardware) -> bool:
    """A driver before 525, which runs neither CUDA, fails the check `driver`."""
    return cuda_of(torch) == 13 and stack.OLDEST_DRIVER <= (hardware.driver_major or 580) < 580


def lacks_hopper_kernels(torch: str, hardware: Hardware) -> bool:
    return cuda_of(torch) == 11 and any(gpu.compute_capability >= (9, 0) for gpu in hardware.gpus)


def flash_attn(installed: Versions, hardware: Hardware) -> str | None:
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


HUGGING_FACE = ("transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "huggingface-hub", "safetensors")
UNSLOTH = ("torch", *HUGGING_FACE, "unsloth", "unsloth-zoo", "bitsandbytes", "xformers", "triton")
RULES: tuple[Rule, ...] = (
    Rule("llama-3.1-transformers", "Llama 3.1 has five-field rope_scaling, which older releases refuse"
         ' ("`rope_scaling` must be a dictionary with two fields")',
         "https://github.com/huggingface/transformers/releases/tag/v4.43.0",
         ("transformers", "tokenizers", "huggingface-hub"),
         where("transformers", lambda version, _: release(version) < (4, 43), "is older than 4.43")),
    Rule("unsloth-limits", "unsloth patches these packages' insides and declares the releases that it knows",
         "https://github.com/unslothai/unsloth/blob/main/pyproject.toml",
         UNSLOTH, declared(("unsloth", "unsloth-zoo"), about=None)),
    Rule("hugging-face-limits", "transformers and its kin check each other's versions at import and stop",
         "https://github.com/huggingface/transformers/blob/main/src/transformers/dependency_versions_check.py",
         HUGGING_FACE, declared(HUGGING_FACE, about=HUGGING_FACE)),
    Rule("torchvision-torch",
         'each torchvision is compiled for one torch ("operator torchvision::nms does not exist")',
         "https://github.com/pytorch/vision#installation",
         ("torch", "torchvision"), declared(("torchvision",), about=("torch",))),
    Rule("triton-torch", "torch's compiler is made for one triton, which its CUDA build pins",
         "https://github.com/pytorch/pytorch/blob/main/RELEASE.md",
         ("torch", "triton"), declared(("torch",), about=("triton",))),
    Rule("numpy-abi", "packages compiled for numpy 1 crash under numpy 2, and newer ones refuse numpy 1",
         "https://numpy.org/doc/stable/dev/depending_on_numpy.html#numpy-2-0-specific-advice",
         ("numpy", "pandas", "pyarrow", "matplotlib", "contourpy", "torch"), declared(None, about=("numpy",))),
    Rule("flash-attn-torch", 'flash-attn is compiled for one torch, CUDA and C++ ABI ("undefined symbol")',
         "https://github.com/Dao-AILab/flash-attention/issues/975",
         ("flash-attn",), flash_attn, REINSTALL_FLASH_ATTN),
    Rule("torch-cpu-build", "a CPU build of torch leaves the GPU idle", "https://pytorch.org/get-started/locally/",
         ("torch", "triton"),
         where("torch", lambda version, machine: bool(machine.gpus) and "+cpu" in version, "cannot use the {gpu}"),
         RECREATE),
    Rule("driver-cuda-13", "CUDA 13 builds need driver 580; an older one runs the CUDA 12 builds",
         "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
         ("torch",), where("torch", needs_newer_driver, "needs driver 580, {driver} is installed"),
         stack.fix_command(("torch", "torchvision"), "cu12")),
    Rule("cuda-11-hopper", "CUDA 11.8 knows Hopper, but its libraries lack most Hopper kernels",
         "https://docs.nvidia.com/cuda/hopper-compatibility-guide/",
         ("torch",), where("torch", lacks_hopper_kernels, "on the {gpu}"), slower_only=True),
    Rule("unsloth-cpu", "releases until about 2026.8 raise NotImplementedError without a GPU",
         "https://github.com/unslothai/unsloth/releases", ("unsloth", "unsloth-zoo"),
         where("unsloth", lambda version, machine: not machine.gpus and release(version) < (2026, 9),
               "on a machine without a GPU")),
)  # fmt: skip
