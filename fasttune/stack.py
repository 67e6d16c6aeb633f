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
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# torch 2.11's newest CUDA 12 build; any driver >= 525 runs it, Blackwell included.
# https://github.com/pytorch/pytorch/pull/175253 and https://docs.nvidia.com/deploy/cuda-compatibility/
CU12_INDEX = "https://download.pytorch.org/whl/cu128"
TORCH_FAMILY = ("torch", "torchvision", "triton")  # what comes from PyTorch's own index on the cu12 stack
CUDA_WHEEL = re.compile(r"^(nvidia-|cuda-)")
OLDEST_DRIVER = 525  # of CUDA 12: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DISK_NEEDED_GIB = {"cpu": 4, "cu130": 12, "cu12": 12}
DRIVERS_URL = "https://docs.nvidia.com/datacenter/tesla/driver-installation-guide/"


def _stack_dir() -> Path:
    checkout = Path(__file__).resolve().parent.parent / "stacks"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "fasttune" / "stacks"


STACK_DIR = _stack_dir()


@dataclass(frozen=True)
class Pin:
    """A version, and the SHA-256 of the files it may be installed from (none: a build that depends on the index)."""

    version: str
    hashes: tuple[str, ...]


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
    """The pin file of a stack; `cu12` shares that of `cu130`, only its torch comes from elsewhere."""
    if name not in stack_names():
        raise FasttuneError(f"--stack {name}: no such stack (choose one of {', '.join(stack_names())})")
    return STACK_DIR / f"{'cu130' if name == 'cu12' else name}.txt"


def read_pins(name: str, python: tuple[int, int] | None = None) -> dict[str, str]:
    """The pins of a stack for a Python version (default: this one), canonical name → version.

    `cu12` carries a local version for torch and torchvision and no pins for the CUDA libraries that they bring along.
    Raises FasttuneError for an unknown stack or an unreadable file.
    """
    pins = read_pin_file(stack_file(name), python)
    if name == "cu12":
        tag = CU12_INDEX.rsplit("/", 1)[1]
        pins = {package: version for package, version in pins.items() if not CUDA_WHEEL.match(package)}
        pins |= {package: f"{pins[package]}+{tag}" for package in ("torch", "torchvision")}
    return pins


def read_pin_file(path: Path, python: tuple[int, int] | None = None) -> dict[str, str]:
    """The pins of a file, canonical name → version."""
    return {name: pin.version for name, pin in parse_pin_file(path, python).items()}


def requirements(name: str, python: tuple[int, int] | None = None) -> list[str]:
    """Lines for `pip install --require-hashes -r`: the packages of a stack with their hashes.

    What comes from PyTorch's own index is left out: torch of `cpu`, and TORCH_FAMILY with the CUDA libraries of `cu12`.
    """
    pins = parse_pin_file(stack_file(name), python)
    elsewhere = set(TORCH_FAMILY) if name == "cu12" else set()
    return [
        " ".join([f"{package}=={pins[package].version}", *(f"--hash={digest}" for digest in pins[package].hashes)])
        for package in read_pins(name, python)
        if package not in elsewhere and pins[package].hashes
    ]


def parse_pin_file(path: Path, python: tuple[int, int] | None = None) -> dict[str, Pin]:
    """Parse `name==version [; python_version < "3.12"] [--hash=sha256:…]`, what stacks/regenerate.py writes."""
    python = python or sys.version_info[:2]
    pin = r'([\w.-]+)==([^\s;]+)(?:\s*;\s*python_version (<|>=) "(\d+)\.(\d+)")?'
    line_form = re.compile(pin + r"((?:\s+--hash=sha256:[0-9a-f]{64})*)")
    pins = {}
    for number, line in _joined_lines(path):
        match = line_form.fullmatch(line)
        if not match:
            raise FasttuneError(f"{path}:{number}: not a pin `name==version`: {line} (run stacks/regenerate.py)")
        package, version, operator, major, minor, hashes = match.groups()
        if operator and (python < (int(major), int(minor))) != (operator == "<"):
            continue
        pins[canonical(package)] = Pin(version, tuple(digest.removeprefix("--hash=") for digest in hashes.split()))
    return pins


def _joined_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a requirements file with their numbers, without comments, continued ones (`\\`) joined."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise FasttuneError(f"{path}: cannot read the pins of the stack ({error.strerror})") from None
    joined: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        text = line.partition("#")[0].strip()
        joined += text.removesuffix("\\").split()
        if joined and not text.endswith("\\"):
            yield number, " ".join(joined)
            joined = []


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
    wrong = {item.name for item in compare(pins, installed())}
    family = [name for name in pins if name in TORCH_FAMILY or CUDA_WHEEL.match(name)]
    wanted = packages + family if "torch" in wrong.intersection(packages) else packages
    differing = [name for name in dict.fromkeys(wanted) if name in wrong] or sorted(wrong)
    return fix_command(differing, stack) if differing else fix_command(packages, stack, "--force-reinstall")


def fix_command(packages: Iterable[str], stack: str, *options: str) -> str:
    """The command that puts these packages to the stack's pins in the running interpreter."""
    pins, packages = read_pins(stack), list(packages)
    pip = [sys.executable, "-m", "pip", "install", *options]
    commands = []
    if stack == "cu12" and (torch := [name for name in packages if name in TORCH_FAMILY and "+" in pins[name]]):
        # with what it needs: the CUDA 12 libraries of this torch are no pins of ours
        commands.append([*pip, *(f"{name}=={pins[name]}" for name in torch), "--index-url", CU12_INDEX])
        packages = [name for name in packages if name not in TORCH_FAMILY]
    extra = ["--extra-index-url", CPU_INDEX] if stack == "cpu" and "torch" in packages else []
    if wanted := [f"{name}=={pins[name]}" for name in packages if name in pins]:
        commands.append([*pip, "--no-deps", *extra, *wanted])
    return " && ".join(map(shlex.join, commands)) or "bash scripts/setup_h100.sh"


if __name__ == "__main__":  # `python -m fasttune.stack cu12`: what the set-up gives to pip
    print("\n".join(requirements(sys.argv[1])))
