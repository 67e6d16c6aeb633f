"""Rules for people who come with another stack: version_rules.toml says what belongs together, this file looks.

A rule reads versions, metadata and hardware; it never imports the package: a broken one would take the check down too.
What packages declare of each other is read from their metadata; only what none of them declares is a condition here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires

from fasttune import stack
from fasttune.hardware import Hardware
from fasttune.verify import PIP, Result, install_command, read_table

Versions = Mapping[str, str]  # canonical name → version, as stack.installed() gives it
Condition = Callable[[Versions, Hardware], str | None]  # what is wrong, in words

RECREATE = "bash scripts/setup_h100.sh --recreate"
# Releases that were built for numpy 1 and do not all say so: https://github.com/numpy/numpy/issues/26191
# torch: https://github.com/pytorch/pytorch/issues/107302
BUILT_FOR_NUMPY_1 = {"torch": "<2.3", "pandas": "<2.2.2", "pyarrow": "<16", "matplotlib": "<3.9"}


@dataclass(frozen=True)
class Rule:
    """What belongs together, as version_rules.toml has it."""

    name: str
    reason: str
    source: str
    packages: list[str]
    limits: dict[str, list[str]] = field(default_factory=dict)
    remedy: str = ""
    slower_only: bool = False

    def problem(self, installed: Versions, hardware: Hardware) -> str | None:
        """What is wrong, or None."""
        if not self.limits:
            return CONDITIONS[self.name](installed, hardware)
        names = self.limits.get("by") or [name for name in installed if name != "fasttune"]
        unmet_limits = [text for name in names for text in unmet(name, installed, self.limits.get("about"))]
        return "; ".join(dict.fromkeys(unmet_limits)) or None

    def fix(self, stack_name: str, installed: Versions) -> str:
        """Puts what differs to the stack's pins and removes what the stack does without."""
        if self.remedy:
            return self.remedy.format(pip=PIP, cuda_12_torch=stack.fix_command(("torch", "torchvision"), "cu12"))
        pins = stack.read_pins(stack_name)
        needless = [name for name in self.packages if name not in pins and name in installed]
        wrong = stack.compare({name: pins[name] for name in self.packages if name in pins}, installed)
        commands = [stack.repair_command([item.name for item in wrong], stack_name)] if wrong else []
        commands += [f"{PIP} uninstall -y {' '.join(needless)}"] if needless else []
        return " && ".join(commands) or RECREATE  # all as pinned: a package from outside the stack does not fit


def rules() -> list[Rule]:
    return [Rule(name, **each) for name, each in read_table("version_rules.toml").items()]


def results(stack_name: str, installed: Versions, hardware: Hardware) -> Iterator[Result]:
    """What every rule says of this environment."""
    for rule in rules():
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


def unmet(package: str, installed: Versions, about: list[str] | None) -> Iterator[str]:
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


def where(package: str, wrong: Callable[[str, Hardware], bool], words: str) -> Condition:
    """A problem where the installed version of a package is `wrong` on this machine."""

    def condition(installed: Versions, hardware: Hardware) -> str | None:
        version = installed.get(package)
        if not version or not wrong(version, hardware):
            return None
        gpu = hardware.gpus[0].name if hardware.gpus else ""
        return f"{package} {version} " + words.format(gpu=gpu, driver=hardware.driver)

    return condition


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


# A driver before 525, which runs neither CUDA, fails the check `driver`.
CONDITIONS: dict[str, Condition] = {
    "llama-3.1-transformers": where("transformers", lambda v, _: release(v) < (4, 43), "is older than 4.43"),
    "flash-attn-torch": flash_attn,
    "torch-cpu-build": where("torch", lambda v, here: bool(here.gpus) and "+cpu" in v, "cannot use the {gpu}"),
    "driver-cuda-13": where(
        "torch",
        lambda v, here: cuda_of(v) == 13 and stack.OLDEST_DRIVER <= (here.driver_major or 580) < 580,
        "needs driver 580, {driver} is installed",
    ),
    "cuda-11-hopper": where(
        "torch",
        lambda v, here: cuda_of(v) == 11 and any(gpu.compute_capability >= (9, 0) for gpu in here.gpus),
        "on the {gpu}",
    ),
    "unsloth-cpu": where(
        "unsloth", lambda v, here: not here.gpus and release(v) < (2026, 9), "on a machine without a GPU"
    ),
}
