"""Which versions belong together: the pinned stacks, the choice between them, and what is installed here.

The rules for people who come with another stack are data in `RULES` (fasttune/verify/version_rules.py).
Importing this needs the standard library only: the set-up uses it before anything is installed.
"""

import contextlib
import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fasttune.errors import FasttuneError
from fasttune.hardware import Hardware, detect

MARKER_FILE = "fasttune-setup.json"  # written into the environment by the set-up
TORCH_FAMILY = ("torch", "torchvision", "triton")
CUDA_WHEEL = re.compile(r"^(nvidia-|cuda-)")
OLDEST_DRIVER = 525  # of CUDA 12: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DISK_NEEDED_GIB = {"cpu": 4, "cu130": 12, "cu12": 12}
DRIVERS_URL = "https://docs.nvidia.com/datacenter/tesla/driver-installation-guide/"


@dataclass(frozen=True)
class Build:
    """Another build than PyPI's: the index that has it, and its versions. No other file carries these versions."""

    index: str
    versions: Mapping[str, str]


TORCH: Mapping[str, Build] = {
    "cpu": Build("https://download.pytorch.org/whl/cpu", {"torch": "2.13.0+cpu"}),
    # torch 2.11's newest CUDA 12 build; any driver >= 525 runs it, Blackwell included.
    # https://github.com/pytorch/pytorch/pull/175253 and https://docs.nvidia.com/deploy/cuda-compatibility/
    "cu12": Build("https://download.pytorch.org/whl/cu128", {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128"}),
}


def _stack_dir() -> Path:
    checkout = Path(__file__).resolve().parent.parent / "stacks"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "fasttune" / "stacks"


STACK_DIR = _stack_dir()


@dataclass(frozen=True)
class Mismatch:
    """A package whose installed version is not the pinned one (`installed` is None where it is missing)."""

    name: str
    pinned: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.name} {self.installed or 'missing'} (the stack pins {self.pinned})"


def canonical(name: str) -> str:
    """The name as PEP 503 compares it: `Unsloth_Zoo` is `unsloth-zoo`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def stack_names() -> list[str]:
    return ["cpu", "cu130", "cu12"]


def stack_file(name: str) -> Path:
    if name not in stack_names():
        raise FasttuneError(f"--stack {name}: no such stack (choose one of {', '.join(stack_names())})")
    return STACK_DIR / f"{name}.txt"


def read_pins(name: str, python: tuple[int, int] | None = None) -> dict[str, str]:
    """The pins of a stack for a Python version (default: this one), canonical name → version.

    Raises FasttuneError for an unknown stack or an unreadable file.
    """
    pins = read_pin_file(stack_file(name), python)
    return pins | dict(TORCH[name].versions) if name in TORCH else pins


def read_pin_file(path: Path, python: tuple[int, int] | None = None) -> dict[str, str]:
    """The pins of a file, canonical name → version: what stacks/regenerate.py writes, without the hashes."""
    python = python or sys.version_info[:2]
    form = re.compile(
        r'([\w.-]+)==([^\s;]+)(?:\s*;\s*python_version (<|>=) "(\d+)\.(\d+)")?(\s+--hash=sha256:[0-9a-f]{64})*'
    )
    try:
        text = path.read_text().replace("\\\n", " ")
    except OSError as error:
        raise FasttuneError(f"{path}: cannot read the pins of the stack ({error.strerror})") from None
    pins = {}
    for line in text.splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        if not (match := form.fullmatch(line)):
            raise FasttuneError(f"{path}: not a pin `name==version`: {line} (run stacks/regenerate.py)")
        package, version, operator, major, minor, _ = match.groups()
        if not operator or (python < (int(major), int(minor))) == (operator == "<"):
            pins[canonical(package)] = version
    return pins


def choose_stack(hardware: Hardware) -> tuple[str, str]:
    """The stack for this machine and why, in words; raises FasttuneError for a GPU or driver that cannot serve."""
    if not hardware.gpus:
        if hardware.silent_gpu:
            return "cpu", f"an NVIDIA chip is on the bus, but no driver answers: install one ({DRIVERS_URL}), run again"
        return "cpu", "no NVIDIA GPU"
    gpu, driver = hardware.gpus[0], hardware.driver_major or 0
    if gpu.compute_capability < (8, 0):
        capability = ".".join(map(str, gpu.compute_capability))
        raise FasttuneError(
            f"{gpu.name}: compute capability {capability} has no bf16 tensor cores, 8.0 is needed"
            " (rent an A100, L4, H100 or newer; --stack cpu tries things out without the GPU)"
        )
    if driver >= 580:
        return "cu130", f"{gpu.name}, driver {hardware.driver} ≥ 580 runs CUDA 13"
    if driver >= OLDEST_DRIVER:
        return "cu12", f"{gpu.name}, driver {hardware.driver} runs CUDA 12 (CUDA 13 needs 580)"
    raise FasttuneError(
        f"NVIDIA driver {hardware.driver} is too old, {OLDEST_DRIVER} is needed (update it: {DRIVERS_URL})"
    )


def active_stack() -> str:
    """The stack this environment was set up with (its marker file), else the one for this machine, else `cpu`.

    A driver that is too old is to be updated, so the GPU's stack is the right one there.
    """
    try:
        name = json.loads((Path(sys.prefix) / MARKER_FILE).read_text())["stack"]
        stack_file(name)
        return str(name)
    except (OSError, ValueError, KeyError, TypeError, FasttuneError):
        pass
    hardware = detect(hidden_too=True)
    try:
        return choose_stack(hardware)[0]
    except FasttuneError:
        return "cpu" if hardware.gpus[0].compute_capability < (8, 0) else "cu130"


def distributions() -> Iterator[tuple[str, str, importlib.metadata.Distribution]]:
    """(canonical name, version, distribution) of all that is installed, in the order in which Python finds it.

    pip names what it was about to remove `~ame`: what a killed pip left is skipped, as pip itself does.
    The two lines are read without the parser of importlib.metadata, which takes a millisecond or two a package.
    """
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        name, version = re.search(r"^Name: *(\S+)", text, re.M), re.search(r"^Version: *(\S+)", text, re.M)
        if name and version and not metadata_folder(distribution).name.startswith("~"):
            yield canonical(name[1]), version[1], distribution


def metadata_folder(distribution: importlib.metadata.Distribution) -> Path:
    """The .dist-info folder; an empty path where a distribution is not a folder."""
    return Path(getattr(distribution, "_path", ""))


def installed() -> dict[str, str]:
    """Every installed distribution, canonical name → version; torch's says its build (`2.11.0+cu130`, `2.13.0+cpu`).

    PyPI's CUDA wheels of torch hide the build from their metadata, so it is read from torch/version.py, unimported.
    """
    versions: dict[str, str] = {}
    for name, version, _ in distributions():
        versions.setdefault(name, version)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        if match := re.search(r"__version__ = '([^']+)'", Path(str(file)).read_text()):
            versions["torch"] = match[1]
    return versions


def compare(pins: Mapping[str, str], versions: Mapping[str, str]) -> list[Mismatch]:
    """Pins that are not met. A pin without a local part (`2.13.0`) is met by any build of it (`2.13.0+cpu`)."""
    mismatches = []
    for name, pinned in pins.items():
        version = versions.get(name)
        if version is None or (version if "+" in pinned else version.partition("+")[0]) != pinned:
            mismatches.append(Mismatch(name, pinned, version))
    return mismatches


def repair_command(packages: Iterable[str], stack: str) -> str:
    """The command that repairs these packages: it names those that differ from the stack's pins.

    With torch goes what belongs to it (torchvision, triton, its CUDA libraries). Where none of them differs, others
    come first; where nothing differs, the files of `packages` are broken: they are installed again.
    """
    pins, packages = read_pins(stack), list(packages)
    wrong = {item.name: item for item in compare(pins, installed())}
    family = [name for name in pins if name in TORCH_FAMILY or CUDA_WHEEL.match(name)]
    wanted = packages + family if "torch" in packages and "torch" in wrong else packages
    differing = [name for name in dict.fromkeys(wanted) if name in wrong] or sorted(wrong)
    if not differing:
        return fix_command(packages, stack, "--force-reinstall")
    return fix_mismatches([wrong[name] for name in differing], stack)


def fix_mismatches(wrong: list[Mismatch], stack: str) -> str:
    """The command for packages that differ from their pins. pip 26 takes one that is half removed (a .dist-info without
    METADATA), which counts as missing here, for installed: so what is missing is installed by force.
    """
    force = ["--force-reinstall"] if any(item.installed is None for item in wrong) else []
    return fix_command([item.name for item in wrong], stack, *force)


def fix_command(packages: Iterable[str], stack: str, *options: str) -> str:
    """The command that puts these packages to the stack's pins in the running interpreter.

    A torch from PyTorch's own index brings the CUDA libraries that belong to it.
    """
    pins, packages = read_pins(stack), list(packages)
    index: list[str] = []
    if stack in TORCH and not TORCH[stack].versions.keys().isdisjoint(packages):
        index = ["--extra-index-url", TORCH[stack].index]
        packages += [name for name in pins if CUDA_WHEEL.match(name) and name not in packages]
    wanted = [f"{name}=={pins[name]}" for name in packages if name in pins]
    command = [sys.executable, "-m", "pip", "install", *options, "--no-deps", *index, *wanted]
    return shlex.join(command) if wanted else "bash scripts/setup_h100.sh"
