"""What this machine is, and the tables about chips."""

import time
from pathlib import Path

import pytest

from fasttune import hardware


def test_detect_reads_this_machine_quickly(tmp_path: Path) -> None:
    start = time.perf_counter()
    seen = hardware.detect(tmp_path / "not" / "yet" / "there")
    assert time.perf_counter() - start < 0.5 or seen.gpus
    assert seen.cores >= 1
    assert 0.1 < seen.memory_gib < 100_000
    assert seen.disk_free_gib > 0
    assert seen.driver is not None or not seen.gpus


def test_cores_honour_affinity_and_cgroup_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str] = {}
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(str(path), ""))
    assert hardware.usable_cores() == 8
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert hardware.usable_cores() == 8
    files["/sys/fs/cgroup/cpu.max"] = "250000 100000"
    assert hardware.usable_cores() == 2
    files["/sys/fs/cgroup/cpu.max"] = "10000 100000"
    assert hardware.usable_cores() == 1
    files.clear()
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "300000"
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000"
    assert hardware.usable_cores() == 3


def test_memory_honours_the_cgroup_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal:  16777216 kB", "/sys/fs/cgroup/memory.max": "max"}
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(str(path), ""))
    assert hardware._memory_gib() == 16
    files["/sys/fs/cgroup/memory.max"] = str(4 * hardware.GIB)
    assert hardware._memory_gib() == 4


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_peak_is_the_dense_figure_or_none(name: str, tflops: float | None) -> None:
    assert hardware.peak_bf16_tflops(name) == tflops


def test_prices_are_an_example_or_none() -> None:
    assert hardware.usd_per_hour("NVIDIA H100 80GB HBM3") == 2.50
    assert hardware.usd_per_hour("Tesla T4") is None
    assert hardware.USD_PER_HOUR_SOURCE.startswith("https://")


def test_matmul_rate_is_measured() -> None:
    shapes = [(64, 128, 32), (256, 256, 256)]
    rates = hardware.measure_matmul_tflops("cpu", "float32", shapes, seconds=0.05)
    assert list(rates) == shapes
    assert all(1e-5 < rate < 100 for rate in rates.values())
