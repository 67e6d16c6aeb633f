"""Runs jobs of checks in child processes, two at a time, with time limits; a dead child is a result, not an end."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fasttune import hardware, system
from fasttune.verify import Result
from fasttune.verify.error_hints import from_exit

PARALLEL = 2


@dataclass(frozen=True)
class Job:
    """Checks of one module (its CHECKS) that share a process; should it die, the rest goes on in a new one."""

    module: str
    names: tuple[str, ...]
    limit_s: float = 120
    hub: Literal["offline", "unset", "open"] = "offline"  # unset: offline is not said, the check blocks the network


@dataclass
class Child:
    """A running job: its process, its report of results and the file that holds what it printed."""

    job: Job
    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]
    started_s: float = field(default_factory=time.monotonic)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: grandchildren too
        self.process.wait()
        self.folder.cleanup()


def run_jobs(jobs: tuple[Job, ...], announce: Callable[[str], None], stop: Sequence[int] = ()) -> list[Result]:
    """Every job in processes of its own, PARALLEL at a time; the results in the order of `jobs`.

    Once `stop` holds something all children are killed; raises KeyboardInterrupt.
    """
    waiting, running = list(jobs), list[Child]()
    results: dict[str, list[Result]] = {name: [] for job in jobs for name in job.names}
    try:
        while waiting or running:
            if stop:
                raise KeyboardInterrupt
            while waiting and len(running) < PARALLEL:
                running.append(start(waiting.pop(0)))
                announce(
                    f"{sum(map(bool, results.values()))}/{len(results)}: {', '.join(c.job.names[0] for c in running)}"
                )
            time.sleep(0.02)
            for child in list(running):
                late = time.monotonic() - child.started_s > child.job.limit_s
                if child.process.poll() is None and not late:
                    continue
                running.remove(child)
                found, rest = collect(child, late)
                for name, result in found:
                    results[name].append(result)
                if rest:
                    waiting.insert(0, dataclasses.replace(child.job, names=rest))
    finally:
        announce("")
        for child in running:
            child.kill()
    return [result for group in results.values() for result in group]


def start(job: Job) -> Child:
    folder = tempfile.TemporaryDirectory(prefix="fasttune-verify-", ignore_cleanup_errors=True)
    command = system.child_command("fasttune.verify.child", job.module, f"{folder.name}/report", *job.names)
    with open(f"{folder.name}/printed", "w+b") as printed:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            cwd=folder.name,
            env=environment(job, Path(folder.name)),
            start_new_session=True,
        )
    return Child(job, process, folder)


def environment(job: Job, folder: Path) -> dict[str, str]:
    """The child's environment: all temporary files and caches in `folder`."""
    env = system.child_environment()
    if job.hub != "open":
        for name in [name for name in env if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
            del env[name]
    if job.hub == "offline":
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    else:  # whether the package is silent by itself is what these checks look at
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
            env.pop(name, None)
    temporary = folder / "tmp"
    temporary.mkdir()
    env |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "FASTTUNE_CACHE": str(folder / "cache"),
        "TMPDIR": str(temporary),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, hardware.usable_cores() // PARALLEL)),
    }
    return env


def collect(child: Child, late: bool) -> tuple[list[tuple[str, Result]], tuple[str, ...]]:
    """(check name, result) of everything the child reported, and the checks that it died before."""
    if late:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
    returncode = child.process.wait()
    folder, names = Path(child.folder.name), list(child.job.names)
    printed = (folder / "printed").read_text(encoding="utf-8", errors="replace")
    report = folder / "report"
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.is_file() else []
    child.kill()
    found: list[tuple[str, Result]] = []
    for line in lines:
        if "done" in line:
            names.remove(line["done"])
        else:
            found.append((names[0], Result(**line)))
    if names:
        suspect = names[0].removeprefix("import:") if names[0].startswith("import:") else ""
        if late:
            detail = f"no answer within {child.job.limit_s:.0f} s, so its process was ended"
            broken = Result(names[0], "fail", detail, f"{sys.executable} -X faulthandler -m fasttune.verify --json")
        else:
            broken = from_exit(names[0], returncode, printed, suspect)
        broken.seconds = round(time.monotonic() - child.started_s, 2)
        found.append((names[0], broken))
    return found, tuple(names[1:])
