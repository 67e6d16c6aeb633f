"""Which versions belong together: the pinned stacks, the choice between them, and what is installed here.

The rules for people who come with another stack are data in `RULES` (fasttune/rules.py).
`python -m fasttune.stack cpu numpy` prints a pin with its hashes, as pip reads it (pip takes hashes from a file only).
Importing this needs the standard library only: the set-up uses it before anything is installed.
"""

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
    """The name as PEP 503 compares it: `unsloth_zoo` and `Unsloth.Zoo` are `unsloth-zoo`."""
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


def requirements(name: str, packages: Iterable[str] = (), python: tuple[int, int] | None = None) -> list[str]:
    """Lines for `pip install --require-hashes -r`: these packages of a stack (default: all of it), with their hashes.

    What comes from PyTorch's own index is left out: torch of `cpu`, and TORCH_FAMILY with the CUDA libraries of `cu12`.
    """
    pins, asked = parse_pin_file(stack_file(name), python), set(packages)
    elsewhere = set(TORCH_FAMILY) if name == "cu12" else set()
    wanted = [package for package in read_pins(name, python) if package not in elsewhere and pins[package].hashes]
    return [
        " ".join([f"{package}=={pins[package].version}", *(f"--hash={digest}" for digest in pins[package].hashes)])
        for package in wanted
        if not asked or package in asked
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
    joined = ""
    for number, line in enumerate(lines, 1):
        joined = f"{joined} {line.partition('#')[0].strip()}".strip()
        if joined.endswith("\\"):
            joined = joined.removesuffix("\\").strip()
        elif joined:
            yield number, joined
            joined = ""
    if joined:
        yield len(lines), joined


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
    if driver >= 525:
        return "cu12", f"{gpu.name}, driver {hardware.driver} runs CUDA 12 (CUDA 13 needs 580)"
    raise FasttuneError(f"NVIDIA driver {hardware.driver} is too old, 525 is needed (update it: {DRIVERS_URL})")


def active_stack() -> str:
    """The stack this environment was set up with (its marker file), else the one for this machine, else `cpu`."""
    try:
        name = json.loads((Path(sys.prefix) / MARKER_FILE).read_text())["stack"]
        stack_file(name)
        return str(name)
    except (OSError, ValueError, KeyError, TypeError, FasttuneError):
        pass
    try:
        return choose_stack(detect())[0]
    except FasttuneError:
        return "cpu"


def installed() -> dict[str, str]:
    """Every installed distribution, canonical name → version; torch's says its build (`2.11.0+cu130`, `2.13.0+cpu`).

    PyPI's CUDA wheels of torch hide the build from their metadata, so it is read from torch/version.py, unimported.
    """
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and distribution.version:  # a half-removed package leaves metadata without them
            versions.setdefault(canonical(name), distribution.version)
    match = re.search(r"__version__ = '([^']+)'", read_dist_file("torch", "torch/version.py"))
    if match and "torch" in versions:
        versions["torch"] = match[1]
    return versions


def read_dist_file(package: str, file: str) -> str:
    """The text of a file of an installed package, empty where there is none."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(file))).read_text()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return ""


def compare(pins: Mapping[str, str], versions: Mapping[str, str]) -> list[Mismatch]:
    """Pins that are not met. A pin without a local part (`2.13.0`) is met by any build of it (`2.13.0+cpu`)."""
    mismatches = []
    for name, pinned in pins.items():
        version = versions.get(name)
        if version is None or (version if "+" in pinned else version.partition("+")[0]) != pinned:
            mismatches.append(Mismatch(name, pinned, version))
    return mismatches


def fix_command(packages: Iterable[str], stack: str) -> str:
    """The command that puts these packages to the stack's pins in the running interpreter, by hash where it can."""
    pins = read_pins(stack)
    wanted = [name for name in packages if name in pins]
    hashed = {line.partition("==")[0] for line in requirements(stack, wanted)} if wanted else set()
    special = [name for name in wanted if name not in hashed]
    index = {"cpu": CPU_INDEX, "cu12": CU12_INDEX}.get(stack)
    install = shlex.join([sys.executable, "-m", "pip", "install", "--no-deps"])
    commands = []
    if special:
        extra = f" --extra-index-url {index}" if index else ""
        commands.append(f"{install}{extra} {' '.join(f'{name}=={pins[name]}' for name in special)}")
    if hashed:
        shown = [f"{name}=={pins[name]}" for name in wanted if name in hashed]
        show = shlex.join([sys.executable, "-m", "fasttune.stack", stack, *shown])
        commands.append(f"{show} | {install} --require-hashes -r /dev/stdin")
    return " && ".join(commands) or "bash scripts/setup_h100.sh"


def main(argv: list[str]) -> int:
    """`STACK [PACKAGE[==VERSION] …]`: prints `requirements()`."""
    try:
        name = argv[0] if argv else active_stack()
        pins, packages = read_pins(name), []
        for package, _, version in (text.partition("==") for text in argv[1:]):
            packages.append(canonical(package))
            if (pinned := pins.get(packages[-1])) is None or version not in ("", pinned):
                raise FasttuneError(f"{package}: the stack {name} pins {pinned or 'no such package'}, not {version}")
        print("\n".join(requirements(name, packages)))
    except FasttuneError as error:
        print(f"stack: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
