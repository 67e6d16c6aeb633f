"""One GPU for a command, whatever the box holds: a stand-in for nvidia-smi, which answers as the real one does."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fasttune import chips, cli, gpus, hardware
from fasttune.errors import FasttuneError
from fasttune.gpus import VISIBLE, Gpu

H100, OTHER, CUT = "GPU-5a2b0c11-0000", "GPU-77c10d22-0000", "GPU-90ff0e33-0000"
BIG, SMALL = "MIG-11aa0000-0000", "MIG-22bb0000-0000"
CARDS = f"""NVIDIA H100 80GB HBM3, 9.0, 81559, 580.95.05, {H100}, Disabled, 700.00, 700.00, 700.00
NVIDIA H100 80GB HBM3, 9.0, 81559, 580.95.05, {OTHER}, Disabled, 700.00, 700.00, 500.00
NVIDIA A100-SXM4-80GB, 8.0, 81920, 580.95.05, {CUT}, Enabled, 400.00, [N/A], 400.00
"""
LIST = f"""GPU 0: NVIDIA H100 80GB HBM3 (UUID: {H100})
GPU 1: NVIDIA H100 80GB HBM3 (UUID: {OTHER})
GPU 2: NVIDIA A100-SXM4-80GB (UUID: {CUT})
  MIG 3g.40gb     Device  0: (UUID: {BIG})
  MIG 1g.10gb     Device  1: (UUID: {SMALL})
"""
XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><gpu id="x"><fb_memory_usage><total>81920 MiB</total></fb_memory_usage><mig_devices>
<mig_device><index>0</index><fb_memory_usage><total>40192 MiB</total></fb_memory_usage></mig_device>
</mig_devices></gpu></nvidia_smi_log>
"""
SMI = """#!/bin/sh
case "$*" in
  --query-gpu=name*) cat "$0.query" ;;
  -L) cat "$0.list" ;;
  "-q -x -i GPU-90ff0e33-0000") cat "$0.xml" ;;
  --query-compute-apps=*"-i GPU-"*) ;;
  *) exit 6 ;;
esac
"""


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two H100 and an A100 cut into slices; returns the stand-in, whose answers lie beside it."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    for name, text in (("", SMI), (".query", CARDS), (".list", LIST), (".xml", XML)):
        Path(f"{program}{name}").write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(VISIBLE, "")  # put back at the end, whatever a command sets
    return program


def show(monkeypatch: pytest.MonkeyPatch, listed: str | None) -> None:
    monkeypatch.setenv(VISIBLE, listed or "")
    if listed is None:
        monkeypatch.delenv(VISIBLE)


@pytest.mark.parametrize(
    ("listed", "taken", "seen"),
    [
        (None, H100, 4),
        ("1", OTHER, 1),
        ("1,0", OTHER, 2),
        ("0,9,1", H100, 1),  # CUDA stops at the first that is none
        (OTHER, OTHER, 1),
        ("GPU-77", OTHER, 1),
        ("2", BIG, 1),
        (CUT, BIG, 1),
        (SMALL, SMALL, 1),
        ("MIG-11,MIG-22", BIG, 2),
    ],
)
def test_the_first_gpu_that_may_be_used_is_pinned_by_its_id(
    box: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    listed: str | None,
    taken: str,
    seen: int,
) -> None:
    show(monkeypatch, listed)
    assert len(hardware.detect().gpus) == seen
    gpus.pin()
    assert os.environ[VISIBLE] == taken
    (gpu,) = hardware.detect().gpus
    assert gpu.uuid == taken
    said = capsys.readouterr().err
    assert said.count("\n") == (seen > 1)
    assert said == "" or (f"the first of {seen} that it may use: {gpu.name} ({taken})" in said)
    gpus.pin()  # a process that it starts
    assert os.environ[VISIBLE] == taken and capsys.readouterr().err == ""


def test_facts_are_those_of_the_pinned_card_or_slice(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, "1")
    machine = hardware.detect()
    name = "NVIDIA H100 80GB HBM3"
    assert machine.gpus == (Gpu(name, (9, 0), 81559 / 1024, OTHER, OTHER, 500.0, 700.0),)
    assert machine.driver == "580.95.05" and gpus.capped(machine.gpus[0]) == (
        "power cap 500 W of 700 W: slower than a full card"
    )
    show(monkeypatch, "2")
    (cut,) = hardware.detect().gpus
    assert cut == Gpu("NVIDIA A100-SXM4-80GB MIG 3g.40gb", (8, 0), 40192 / 1024, BIG, CUT, 400.0, 400.0)
    assert cut.sliced and gpus.capped(cut) is None and chips.peak_bf16_tflops(cut.name) is None
    show(monkeypatch, SMALL)  # whose memory nvidia-smi does not say
    assert hardware.detect().gpus[0].memory_gib == 10


@pytest.mark.parametrize("listed", ["", "-1", "NoDevFiles"])
def test_who_wants_the_cpu_gets_it(box: Path, monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    show(monkeypatch, listed)
    gpus.pin()
    seen = hardware.detect()
    assert (os.environ[VISIBLE], seen.gpus, seen.driver, seen.silent_gpu) == (listed, (), "580.95.05", False)
    assert hardware.detect(hidden_too=True).gpus[0].uuid == H100, "what is installed suits the machine"


@pytest.mark.parametrize("command", ["train", "bench", "plan", "generate", "merge", "eval"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    box: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    show(monkeypatch, "7")
    options = {"generate": ["--prompt", "x"], "merge": ["--out", "x"]}
    assert cli.main([command, "nowhere", *options.get(command, [])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{VISIBLE}=7: names no GPU of this machine: unset" in said
    show(monkeypatch, "GPU-0000")
    with pytest.raises(FasttuneError, match="names no GPU of this machine"):
        gpus.pin()


def test_each_process_of_torchrun_takes_its_own(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, "0,1")
    both = gpus.visible(gpus.read()[0])
    for rank in (0, 1):
        show(monkeypatch, "0,1")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        gpus.pin()
        assert os.environ[VISIBLE] == both[rank].uuid
    show(monkeypatch, "0,1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(FasttuneError, match="process 3 of this machine has no GPU, only 2"):
        gpus.pin()
    assert (gpus.count("all"), gpus.count("2")) == (2, 2)
    with pytest.raises(FasttuneError, match="--gpus 3: this machine has 2"):
        gpus.count("3")


def test_nothing_is_touched_without_nvidia_smi(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box.with_name("nvidia-smi.query").write_text("NVIDIA-SMI has failed because it could not reach the driver.\n")
    show(monkeypatch, "7")
    gpus.pin()
    assert (os.environ[VISIBLE], hardware.detect().gpus) == ("7", ())


def test_every_process_of_a_benchmark_sees_one_gpu(
    box: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two, transformers' Trainer would be DataParallel, with twice the rows a step."""
    import torch

    from fasttune.bench import run

    show(monkeypatch, "1,0")
    given: list[str] = []
    real = run.subprocess.run

    def started(command: list[str], **options: Any) -> Any:
        if "fasttune.bench.worker" not in command:
            return real(command, **options)
        given.append(options["env"][VISIBLE])
        return SimpleNamespace(stdout='{"failure": "ValueError: seen"}', stderr="", returncode=0)

    monkeypatch.setattr(run.subprocess, "run", started)
    config = tmp_path / "c.yaml"
    config.write_text("model: {name: 'builtin:tiny'}\ndata: {train: 'builtin:arithmetic'}\n")
    assert cli.main(["bench", str(config), "--output", str(tmp_path / "out")]) == 1
    assert "the job could not be prepared: ValueError: seen" in capsys.readouterr().err
    assert given == [OTHER]
    assert torch.cuda._parse_visible_devices() == [OTHER], "how torch reads it"


def test_the_gpu_is_what_torch_can_use_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container without nvidia-smi, or with a share of the memory only (MPS)."""
    import torch

    nothing = hardware.Hardware("linux", "x86_64", "2.36", "3.11.2", "CPU", 2, 23.4, 99.0)
    machine = chips.with_gpu(nothing, "h100-80")
    seen = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=int(79.2 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.as_torch_sees(nothing) is nothing
    with pytest.raises(FasttuneError, match=f"cannot use the NVIDIA H100 80GB HBM3: fasttune verify.*{VISIBLE}= "):
        hardware.as_torch_sees(machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert hardware.as_torch_sees(machine) == machine, "what the driver keeps for itself makes no difference"
    assert hardware.as_torch_sees(nothing).gpus == (Gpu("NVIDIA H100 80GB HBM3", (9, 0), pytest.approx(79.2)),)
    seen.total_memory = 20 * 2**30
    assert hardware.as_torch_sees(machine).gpus == (replace(machine.gpus[0], memory_gib=20.0),)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(FasttuneError, match=f"torch sees 2 GPUs; choose one: export {VISIBLE}=0"):
        hardware.as_torch_sees(machine)
