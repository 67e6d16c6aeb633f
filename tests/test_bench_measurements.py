"""What a benchmark keeps: interrupted it is resumed, no number is relabelled, and what disturbed it is said."""

import json
import os
import shlex
import signal
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fasttune import chips, cli, config, hardware
from fasttune.bench import run
from fasttune.bench.run import Measurements
from fasttune.bench.stats import Bench
from fasttune.errors import DataError, FasttuneError, OutputError, RunFailed
from tests.test_bench import STEPS, TREE
from tests.test_bench_page import make_repeat as repeat

IDENTITY: dict[str, Any] = {
    "config": {"train": {"learning_rate": 0.1, "epochs": 1}, "seed": 0},
    "steps": 3,
    "git": "abc1234",
    "versions": {"torch": "2.13.0", "trl": "1.0"},
    "machine": "NVIDIA H200",
}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"git": "def5678"}, "git was abc1234, is def5678"),
        ({"versions": {"torch": "2.13.0"}}, "versions.trl was 1.0, is None"),
        ({"config": {"train": {"learning_rate": 0.2, "epochs": 1}, "seed": 0}}, "train.learning_rate was 0.1, is 0.2"),
        ({"steps": 4, "git": "d", "machine": "x", "versions": {}}, "steps was 3, is 4, git was abc1234, is d, "),
    ],
)
def test_a_folder_of_other_measurements_is_refused_with_what_differs(tmp_path: Path, now: Any, told: str) -> None:
    Measurements(tmp_path, IDENTITY, "2026-11-20")
    before = (tmp_path / "measurements.jsonl").read_bytes()
    with pytest.raises(OutputError) as caught:
        Measurements(tmp_path, IDENTITY | now, "2026-11-21")
    (line,) = str(caught.value).splitlines()
    assert told in line and line.endswith("; name another folder with --output, or remove this one")
    assert ("and 2 more" in line) == (len(now) > 1)
    assert (tmp_path / "measurements.jsonl").read_bytes() == before


def test_measurements_that_are_gone_on_with_keep_their_date_and_objections(tmp_path: Path) -> None:
    Measurements(tmp_path, IDENTITY, "2026-11-20").add(
        {"arm": "fasttune", "repeat": 0, "x": 1, "objections": ["it was hot"]}
    )
    again = Measurements(tmp_path, IDENTITY, "2026-11-21")
    assert (again.date, again.lines[0]["objections"]) == ("2026-11-20", ["it was hot"])
    assert (again.get("fasttune", 0) or {})["x"] == 1
    first = json.loads((tmp_path / "measurements.jsonl").read_text().splitlines()[0])
    assert first == IDENTITY | {"date": "2026-11-20"}  # benchmarks/add_result.py reads its config


@pytest.mark.parametrize("torn", [1, 20, -1])
def test_a_torn_last_line_is_measured_again(tmp_path: Path, torn: int) -> None:
    file = tmp_path / "measurements.jsonl"
    made = Measurements(tmp_path, IDENTITY, "2026-11-20")
    for number in (0, 1):
        made.add({"arm": "limit", "repeat": number, "tflops": 1.0, "objections": []})
    whole = file.read_text()
    first, second, third = whole.splitlines(keepends=True)
    file.write_text(first + second + third[:torn])  # the whole line without its end is the last of them
    again = Measurements(tmp_path, IDENTITY, "2026-11-21")
    assert again.get("limit", 0) and (again.get("limit", 1) is None) == (torn > 0)
    if torn > 0:
        again.add({"arm": "limit", "repeat": 1, "tflops": 1.0, "objections": []})
    assert file.read_text() == whole, "what comes next stands on a line of its own"
    file.write_text(first[:30])
    assert Measurements(tmp_path, IDENTITY, "2026-11-21").date == "2026-11-21"
    file.write_text(first + second[:9] + "\n" + third)
    with pytest.raises(OutputError, match=r"measurements\.jsonl line 2 is no valid JSON"):
        Measurements(tmp_path, IDENTITY, "2026-11-21")


SMI = """#!/bin/sh
case "$*" in *--loop=1*) ;; *) exit 0 ;; esac
{lines}
touch "$0.said"
exec sleep 60
"""


def stub_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Path:
    """An nvidia-smi that answers a loop with these lines, and nothing else. Returns the file that is there then."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI.format(lines="\n".join(f"echo '{line}'" for line in lines)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program.with_name("nvidia-smi.said")


H200 = chips.with_gpu(hardware.Hardware("linux", "x86_64", "2.36", "3.11.2", "CPU", 2, 23.4, 99.0), "h200-141")


def test_throttling_and_power_are_seen_while_they_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a measurement; when the last one has ended it is over. Of that very card, not of its neighbours.

    A card at its own full limit is not throttled. Loading, which draws little, is in no mean.
    """
    cold, at_limit = "Not Active, " * 4 + "Not Active, ", "Not Active, " * 4 + "Active, "
    hot = "Not Active, Active, Not Active, Not Active, Not Active, "
    braked = "Active, Not Active, [N/A], Active, Active, "
    lines = [cold + "120.00, 3", at_limit + "690.00, 99", hot + "600.00, 98", braked + "[N/A], 97", cold + "130.00, 0"]
    said = stub_smi(tmp_path, monkeypatch, *lines)
    watches: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def remembered(*arguments: Any, **options: Any) -> Any:
        watches.append(popen(*arguments, **options))
        return watches[-1]

    monkeypatch.setattr(run.subprocess, "Popen", remembered)
    machine = replace(H200, gpus=(replace(H200.gpus[0], uuid="MIG-1", card="GPU-7"),))
    with run.watched(machine) as found:
        wait_for(said)
    names = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
    throttled = [f"the GPU was throttled ({name})" for name in names]
    assert found == {"objections": throttled, "power_w": 645.0, "at_power_limit": pytest.approx(2 / 3)}
    assert watches[0].args[-2:] == ["-i", "GPU-7"]
    with pytest.raises(KeyboardInterrupt), run.watched(machine):
        raise KeyboardInterrupt
    assert [watch.returncode for watch in watches] == [-signal.SIGTERM] * 2, "nothing is left running"


def test_a_driver_that_does_not_say_it_is_an_objection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = stub_smi(tmp_path, monkeypatch, 'Field "clocks_event_reasons.x" is not a valid field to query.')
    with run.watched(H200) as found:
        wait_for(said)
    assert found == {"objections": ["nvidia-smi does not say whether the GPU was throttled"]}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with run.watched(replace(H200, gpus=())) as found:
        pass
    assert found == {"objections": []}


def test_only_a_whole_free_card_without_a_power_cap_makes_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    apps = {"GPU-1": "", "GPU-2": "4711, python\n"}
    monkeypatch.setattr(run.gpus, "smi", lambda *arguments: apps[arguments[-1]])

    def told(**changes: Any) -> list[str]:
        return run.busy(replace(H200, gpus=(replace(H200.gpus[0], uuid="GPU-1", card="GPU-1", **changes),)))

    assert told(power_limit_w=700.0, default_power_limit_w=700.0) == told() == []
    assert told(power_limit_w=500.0, default_power_limit_w=700.0) == [
        "power cap 500 W of 700 W: slower than a full card"
    ]
    with pytest.raises(FasttuneError, match="another process is on the GPU .4711, python"):
        run.busy(replace(H200, gpus=(replace(H200.gpus[0], uuid="GPU-2", card="GPU-2"),)))
    slices = replace(H200.gpus[0], uuid="MIG-1", card="GPU-2")
    assert run.busy(replace(H200, gpus=(slices,))) == ["it is a slice of a card: what the other slices do is not known"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def fake_process(measured: list[str], failure: str | None = None, full_steps: int = 9) -> Any:
    """In place of run.fresh_process: the results of a tiny job at once."""

    def fresh(what: str, shared: Path, steps: int) -> dict[str, Any]:
        if what == "share":
            job = (shared / "job.yaml").read_text()
            (shared / "config.yaml").write_text(job.replace("dtype: auto", "dtype: float32"))
            facts = {"tokens_per_epoch": 9, "steps_per_epoch": 9, "full_steps_per_epoch": full_steps}
            wrong_input = {"user_error": failure.partition(": ")[2]} if "DataError" in (failure or "") else {}
            return facts if failure is None else {"failure": failure} | wrong_input
        measured.append(what)
        return {"tflops": 1.0, "shapes": {}} if what == "limit" else asdict(repeat())

    return fresh


def run_it(folder: Path, names: list[str]) -> Bench:
    return run.run(config.parse(TREE), names, 1, STEPS, folder, "", lambda what, share: None)


def test_a_benchmark_is_not_relabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old numbers keep their revision, versions, date and objections, or the folder is refused."""
    measured: list[str] = []
    monkeypatch.setattr(run, "fresh_process", fake_process(measured))
    monkeypatch.setattr(run.hardware, "detect", lambda path: H200)
    monkeypatch.setattr(run, "revision", lambda: "abc1234")
    stub_smi(tmp_path, monkeypatch, "Active, Not Active, Not Active")
    watch = {"objections": ["the GPU was throttled (x)"], "power_w": 650.0}
    monkeypatch.setattr(run, "watched", lambda machine: nullcontext(dict(watch)))
    first = run_it(tmp_path / "out", ["fasttune"])
    assert measured == ["fasttune", "limit"] and first.git == "abc1234"
    monkeypatch.setattr(run, "watched", lambda machine: nullcontext({"objections": []}))
    file = tmp_path / "out" / "measurements.jsonl"
    file.write_text(file.read_text().replace(f'"date": "{first.date}"', '"date": "2020-01-01"'))
    again = run_it(tmp_path / "out", ["fasttune", "vanilla"])
    assert measured == ["fasttune", "limit", "vanilla"]
    power = [[repeat.power_w for repeat in arm.repeats] for arm in again.arms]
    assert power == [[650.0], [None]], "an earlier measurement keeps what was drawn"
    assert again.date == "2020-01-01" and "the GPU was throttled (x)" in again.objections
    for owner, name, value in ((run, "revision", "def5678"), (run.system, "versions", {"torch": "0"})):
        with monkeypatch.context() as changed, pytest.raises(OutputError, match="of another job"):
            changed.setattr(owner, name, lambda value=value: value)
            run_it(tmp_path / "out", ["fasttune"])
    monkeypatch.setattr(run.hardware, "detect", lambda path: chips.with_gpu(H200, "h100-80"))
    with pytest.raises(OutputError, match="machine was NVIDIA H200, is NVIDIA H100 80GB HBM3"):
        run_it(tmp_path / "out", ["fasttune"])
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        ("DataError: data: rows.jsonl holds no rows", FasttuneError, "data: rows.jsonl holds no rows"),
        ("killed by the system, most likely out of memory", RunFailed, "by the system, most likely out of memory"),
        ("ValueError: shapes: 3 and 4", RunFailed, "ValueError: shapes: 3 and 4"),
    ],
)
def test_why_a_job_cannot_be_prepared_is_told_and_only_wrong_input_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, kind: type[FasttuneError], text: str
) -> None:
    monkeypatch.setattr(run, "fresh_process", fake_process([], failure))
    with pytest.raises(FasttuneError) as caught:
        run_it(tmp_path / "out", ["fasttune"])
    assert type(caught.value) is kind and str(caught.value).endswith(text)
    assert caught.value.exit_code == (2 if kind is FasttuneError else 1)
    assert not (tmp_path / "out").exists()


def test_the_recorded_command_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "it's my config.yaml"
    file.write_text(json.dumps(TREE))
    given = [str(file), "data.train={builtin:arithmetic: 2}", "train.batch_rows=8"]
    given += ["--repeats", "2", "--steps", "4", "--arms", "fasttune, vanilla", "--usd-per-hour", "2.5"]
    seen: list[str] = []

    def stop(*arguments: Any) -> None:
        seen.append(arguments[5])
        raise FasttuneError("enough")

    monkeypatch.setattr(run, "run", stop)
    assert cli.main(["bench", *given]) == 2
    assert shlex.split(seen[0]) == ["fasttune", "bench", *given]


def test_too_few_rows_for_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "fresh_process", fake_process([], full_steps=2))
    with pytest.raises(DataError, match="2 full steps of 4 rows are too few"):
        run_it(tmp_path / "out", ["vanilla"])


def test_a_finished_run_in_output_dir_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert run.checked_arms(config.parse(TREE | {"output_dir": str(tmp_path)}), "vanilla", 1, None) == ["vanilla"]
