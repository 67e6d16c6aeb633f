"""What this machine is: cores, memory, GPU and driver; datasheet peak, measured matmul rate, $/hour.

Only the standard library is imported here, so a bare system Python can use it before anything is installed.
"""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fasttune import gpus as cards
from fasttune.errors import FasttuneError
from fasttune.gpus import Gpu as Gpu

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """The facts that choose a stack and explain a number; `driver` is None where nvidia-smi does not answer."""

    os: str
    arch: str
    glibc: str | None
    python: str
    cpu_model: str
    cores: int  # usable by this process: affinity and cgroup quota honoured
    memory_gib: float  # cgroup limit honoured
    disk_free_gib: float  # at the path given to detect()
    gpus: tuple[Gpu, ...] = ()  # that this process may use; the first is the one that a command takes
    driver: str | None = None
    silent_gpu: bool = False  # an NVIDIA chip is on the PCI bus, but its driver does not answer

    @property
    def driver_major(self) -> int | None:
        return int(self.driver.split(".")[0]) if self.driver else None


def line(machine: Hardware | dict[str, Any]) -> str:
    """A machine in one line; a dict is what run.json keeps of one."""
    facts = asdict(machine) if isinstance(machine, Hardware) else machine
    if gpus := facts.get("gpus"):
        return f"{gpus[0]['name']}, {gpus[0]['memory_gib']:.0f} GiB, driver {facts.get('driver')}"
    return f"{facts.get('cpu_model')}, {facts.get('cores')} cores, {facts.get('memory_gib') or 0:.0f} GiB, no GPU"


def machine_name(machine: Hardware) -> str:
    """The kind of machine: what two measurements must share to be compared, and how rates.json calls it."""
    return machine.gpus[0].name if machine.gpus else f"{machine.cpu_model}, {machine.cores} cores"


def detect(path: str | Path = ".", hidden_too: bool = False) -> Hardware:
    """Read the machine without importing torch; takes well under 0.5 s beyond nvidia-smi itself.

    `path` may not exist yet: the free disk is that of its nearest existing parent. hidden_too: also GPUs that
    CUDA_VISIBLE_DEVICES hides, which choose what is to be installed.
    """
    found, driver = cards.read()
    gpus = tuple(cards.visible(found, {} if hidden_too else os.environ))
    libc, version = platform.libc_ver()
    return Hardware(
        os=platform.system().lower(),
        arch=platform.machine(),
        glibc=version if libc == "glibc" else None,
        python=platform.python_version(),
        cpu_model=_cpu_model(),
        cores=usable_cores(),
        memory_gib=_memory_gib(),
        disk_free_gib=disk_free_gib(path),
        gpus=gpus,
        driver=driver,
        silent_gpu=not found and _nvidia_on_pci_bus(),
    )


def as_torch_sees(machine: Hardware) -> Hardware:
    """The machine with its GPU as torch, which is loaded, has it: another memory under MPS, or without nvidia-smi.

    Raises FasttuneError where torch cannot use the GPU, or would use several.
    """
    import torch

    if not torch.cuda.is_available():
        if machine.gpus:
            raise FasttuneError(
                f"torch {torch.__version__} cannot use the {machine.gpus[0].name}: fasttune verify says what fixes it "
                f"({cards.VISIBLE}= before the command: the CPU)"
            )
        return machine
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise FasttuneError(f"torch sees {torch.cuda.device_count()} GPUs; choose one: export {cards.VISIBLE}=0")
    seen = torch.cuda.get_device_properties(torch.cuda.current_device())
    gib = seen.total_memory / GIB
    gpu = machine.gpus[0] if machine.gpus else Gpu(seen.name, (seen.major, seen.minor), gib)
    # nvidia-smi counts what the driver keeps for itself: 1 % on an H100.
    return replace(machine, gpus=(gpu if abs(gpu.memory_gib / gib - 1) < 0.05 else replace(gpu, memory_gib=gib),))


def disk_free_gib(path: str | Path) -> float:
    return shutil.disk_usage(nearest_existing(path)).free / GIB


def nearest_existing(path: str | Path) -> Path:
    """`path`, or the nearest of its parents that is there: where it would be made."""
    whole = Path(path).absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())


def usable_cores() -> int:
    """Cores this process may use: the affinity mask, cut by a cgroup CPU quota (v2, then v1)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, period = [*_read("/sys/fs/cgroup/cpu.max").split(), "", ""][:2]
    if not quota:
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _memory_gib() -> float:
    match = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    limits = [int(match[1]) * 1024] if match else []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (text := _read(file)).isdigit():
            limits.append(int(text))
    return min(limits, default=0) / GIB


def _cpu_model() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return match[1].strip() if match else platform.processor() or platform.machine()


def triton_lacks() -> tuple[str, str] | None:
    """What Triton does not find when it compiles its launcher, at the first step on a GPU, and what installs it.

    Source: triton/runtime/build.py (3.6.0)
    """
    header = Path(sysconfig.get_paths("posix_prefix")["include"]) / "Python.h"
    missing = {}
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing["gcc"] = "a C compiler"
    if not header.is_file():
        missing["python{}.{}-dev".format(*sys.version_info)] = f"Python's headers ({header})"
    return (" and ".join(missing.values()), f"apt-get install -y {' '.join(missing)}") if missing else None


def nvidia_smi_error() -> str:
    """Why there is no GPU: what nvidia-smi says, in one line; empty where there is no nvidia-smi or it sees one."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join((done.stdout + done.stderr).split()) if done.returncode or "GPU " not in done.stdout else ""


def _nvidia_on_pci_bus() -> bool:
    for device in Path("/sys/bus/pci/devices").glob("*"):
        if _read(device / "vendor") == "0x10de" and _read(device / "class").startswith("0x03"):
            return True
    return False


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


class Chip(NamedTuple):
    """What a GPU's datasheet says, and an example of an on-demand price of it."""

    pattern: str  # of nvidia-smi's name; a MIG slice or a laptop chip matches nothing
    bf16_tflops: float  # dense tensor-core peak: datasheets print the figure with sparsity, half of it is here
    memory_tb_per_s: float | None
    usd_per_hour: float | None
    source: str


# The first pattern that matches wins. Prices are the low end among specialised providers on that date; they move and
# differ 2.5-fold between providers, so a config can override them.
USD_PER_HOUR_DATE = "2026-05"
USD_PER_HOUR_SOURCE = "https://www.mercatus-ai.com/blog/cloud-gpu-pricing"
H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
NVIDIA = "https://www.nvidia.com/en-us/data-center"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
CHIPS = (
    Chip(r"\bH200 NVL", 835.5, 4.8, 3.50, f"{NVIDIA}/h200/"),
    Chip(r"\bH200\b", 989.0, 4.8, 3.50, f"{NVIDIA}/h200/"),
    Chip(r"\bGH200\b", 989.0, 4.8, None, f"{NVIDIA}/h200/"),
    Chip(r"\bH100 PCIe", 756.0, 2.0, 2.50, H100),
    Chip(r"\bH100 NVL", 835.5, 3.9, 2.50, f"{NVIDIA}/h100/"),
    Chip(r"\bH100\b", 989.0, 3.35, 2.50, f"{NVIDIA}/h100/"),
    Chip(r"\bB200\b", 2250.0, None, None, f"{NVIDIA}/hgx/"),
    Chip(r"\bA100\b", 312.0, None, 1.10, f"{NVIDIA}/a100/"),
    Chip(r"\bL40S\b", 362.0, None, None, f"{NVIDIA}/l40s/"),
    Chip(r"\bL4\b", 121.0, None, None, f"{NVIDIA}/l4/"),
    Chip(r"\bA10\b", 125.0, None, None, f"{NVIDIA}/products/a10-gpu/"),
    Chip(r"RTX 4090$", 165.2, None, None, ADA),
    Chip(r"RTX 3090$", 71.0, None, None, AMPERE),
)

# GPUs a plan can be made for without having one: name, compute capability and MiB as nvidia-smi says them (with ECC on
# where the card has it). Source: https://docs.nvidia.com/deploy/nvidia-smi/, output on machines with these cards.
KNOWN_GPUS: dict[str, tuple[str, tuple[int, int], int]] = {
    "h200-141": ("NVIDIA H200", (9, 0), 143771),
    "h100-80": ("NVIDIA H100 80GB HBM3", (9, 0), 81559),
    "a100-80": ("NVIDIA A100-SXM4-80GB", (8, 0), 81920),
    "a100-40": ("NVIDIA A100-SXM4-40GB", (8, 0), 40960),
    "l40s-48": ("NVIDIA L40S", (8, 9), 46068),
    "l4-24": ("NVIDIA L4", (8, 9), 23034),
    "rtx4090-24": ("NVIDIA GeForce RTX 4090", (8, 9), 24564),
    "rtx3090-24": ("NVIDIA GeForce RTX 3090", (8, 6), 24576),
}


def with_gpu(machine: Hardware, known: str) -> Hardware:
    """This machine, if it had one of KNOWN_GPUS."""
    name, capability, memory_mib = KNOWN_GPUS[known]
    return replace(machine, gpus=(Gpu(name, capability, memory_mib / 1024),), driver=None, silent_gpu=False)


def chip(gpu_name: str) -> Chip | None:
    """The datasheet of a GPU, or None for one that is not in the table."""
    if re.search(r"\bMIG\b|Laptop", gpu_name):
        return None
    return next((chip for chip in CHIPS if re.search(chip.pattern, gpu_name)), None)


def peak_bf16_tflops(gpu_name: str) -> float | None:
    """Dense bf16 peak of the datasheet in TFLOP/s (989 for H100/H200 SXM), or None for a chip not in the table."""
    return known.bf16_tflops if (known := chip(gpu_name)) else None


def memory_tb_per_s(gpu_name: str) -> float | None:
    """Bandwidth of the datasheet, or None where the table has none."""
    return known.memory_tb_per_s if (known := chip(gpu_name)) else None


def usd_per_hour(gpu_name: str) -> float | None:
    """An example on-demand price in US dollars an hour (see USD_PER_HOUR_DATE), or None where the table has none."""
    return known.usd_per_hour if (known := chip(gpu_name)) else None


def measure_matmul_tflops(
    device: str = "cuda",
    dtype: str = "bfloat16",
    shapes: Sequence[tuple[int, int, int]] = ((8192, 8192, 8192),),
    seconds: float = 2.0,
) -> dict[tuple[int, int, int], float]:
    """Median rate of `A (m, k) @ B (k, n)` for every shape (m, k, n), in TFLOP/s, on random data.

    Never zeros: a chip that multiplies zeros draws less power and clocks higher. `seconds` is split between the shapes.
    """
    import torch

    rates = {}
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(getattr(torch, dtype))
        b = torch.randn(k, n, device=device).to(getattr(torch, dtype))
        multiply = partial(torch.mm, a, b, out=torch.empty(m, n, device=device, dtype=a.dtype))
        rates[m, k, n] = 2 * m * k * n / median_s(multiply, seconds / len(shapes)) / 1e12
    return rates


def median_s(work: Callable[[], object], seconds: float) -> float:
    """Median seconds of five or more calls of `work`, after two that choose and load its kernels.

    Synchronised at both ends where CUDA is in use.
    """
    import torch

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    work(), work()
    times_s: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times_s) < 5 or time.perf_counter() < deadline:
        start = now()
        work()
        times_s.append(now() - start)
    return statistics.median(times_s)


def cpu_matmul_tflops(dtype: str, hidden: int, mlp: int) -> float:
    """What this CPU's matmuls do just now at the widths of a model, with as many tokens as a small micro-batch has.

    The best of three short measurements: other work on the machine only ever lowers one.
    """
    shape = (512, hidden, mlp)
    return max(measure_matmul_tflops("cpu", dtype, [shape], seconds=0.4)[shape] for _ in range(3))
