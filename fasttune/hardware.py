"""What this machine is: cores, memory, GPU and driver, measured matmul rate. Of GPUs more: gpus.py, chips.py.

Only the standard library is imported here, so a bare system Python can use it before anything is installed.
"""

import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fasttune.errors import FasttuneError

GIB = 2**30
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """A card, or a slice of one (MIG), whose power is that of its card. None: the driver does not say."""

    name: str
    compute_capability: tuple[int, int]
    memory_gib: float
    uuid: str = ""  # as CUDA_VISIBLE_DEVICES takes it
    card: str = ""  # as `nvidia-smi -i` takes it
    power_limit_w: float | None = None  # the lowest of those that are set
    default_power_limit_w: float | None = None

    @property
    def sliced(self) -> bool:
        return self.uuid.startswith("MIG-")


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
    found, driver, seen = list[list[Gpu]](), None, list[Gpu]()
    if has_nvidia_smi():
        from fasttune import gpus

        found, driver = gpus.read()
        seen = gpus.visible(found, {} if hidden_too else os.environ)
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
        gpus=tuple(seen),
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
                f"({VISIBLE}= before the command: the CPU)"
            )
        return machine
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise FasttuneError(f"torch sees {torch.cuda.device_count()} GPUs; choose one: export {VISIBLE}=0")
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


def has_nvidia_smi() -> bool:
    """Without it no GPU is used, and gpus.py is not loaded."""
    return shutil.which("nvidia-smi") is not None


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
