"""What this machine is, and the tables about chips."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import chips, gpus, hardware


def test_detect_reads_this_machine(tmp_path: Path) -> None:
    seen = hardware.detect(tmp_path / "not" / "yet" / "there")
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


def test_what_triton_lacks_is_named_with_the_package_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    headers = "python{}.{}-dev".format(*sys.version_info)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert gpus.triton_lacks() is None
    (tmp_path / "Python.h").unlink()
    assert gpus.triton_lacks() == (f"Python's headers ({tmp_path}/Python.h)", f"apt-get install -y {headers}")
    (tmp_path / "gcc").unlink()
    said, command = gpus.triton_lacks() or ("", "")
    assert said.startswith("a C compiler and Python's headers") and command == f"apt-get install -y gcc {headers}"
    monkeypatch.setenv("CC", "/opt/cc")
    assert (gpus.triton_lacks() or ("", ""))[1] == f"apt-get install -y {headers}"


def test_a_run_on_a_gpu_is_refused_before_anything_is_loaded_where_triton_could_not_compile(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771, 580.95.05, GPU-0, Disabled, 700, 700, 700'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": str(tmp_path)}
    command = [sys.executable, "-X", "importtime", "-m", "fasttune.cli", "train", "configs/quickstart.yaml"]
    command += ["model.name=builtin:tiny", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and "apt-get install -y gcc" in said[-1], said
    assert not re.search(r"\| +(torch|unsloth)$", done.stderr, re.M)
    assert not (tmp_path / "run").exists()


def test_a_chip_is_known_by_its_name_whole_and_not_by_another_that_begins_alike() -> None:
    peaks = {
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200 NVL": 835.5,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA A10G": None,
        "": None,
    }
    assert {name: chips.peak_bf16_tflops(name) for name in peaks} == peaks
    assert chips.usd_per_hour("NVIDIA H100 80GB HBM3") and chips.usd_per_hour("Tesla T4") is None


def test_matmul_rate_is_measured() -> None:
    shapes = [(64, 128, 32), (256, 256, 256)]
    rates = hardware.measure_matmul_tflops("cpu", "float32", shapes, seconds=0.05)
    assert list(rates) == shapes
    assert all(1e-5 < rate < 100 for rate in rates.values())
