"""Runs jobs of checks in child processes, two at a time, with time limits; a dead child is a result, not an end.

This module is also the child: `python -m fasttune.verify.runner MODULE REPORT NAME…` runs named checks of MODULE.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fasttune import child_process, hardware
from fasttune.verify import Result
from fasttune.verify.error_hints import explain, from_exception, from_exit

PARALLEL = 2
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True)
class CheckJob:
    """Checks of one module (its CHECKS) that share a process."""

    module: str
    names: tuple[str, ...]
    limit_s: float = 120
    hub: Literal["offline", "unset", "open"] = "offline"  # unset: offline is not said, the check blocks the network


def run_jobs(jobs: Sequence[CheckJob], announce: Callable[[str], None], stop: Sequence[int] = ()) -> list[Result]:
    """Every job in processes of its own, PARALLEL at a time; the results in the order of `jobs`.

    Once `stop` holds something all children are killed; raises KeyboardInterrupt. announce: told every second what is
    running, and at the end nothing.
    """
    began_s, running = time.monotonic(), list[str]()

    def results_of(job: CheckJob) -> list[Result]:
        running.append(job.names[0])
        found = list(run_job(job, stop))
        running.remove(job.names[0])
        return found

    with ThreadPoolExecutor(PARALLEL) as pool:
        made = [pool.submit(results_of, job) for job in jobs]
        while wait(made, timeout=1).not_done:
            announce(f"running {' and '.join(running)} … {time.monotonic() - began_s:.0f} s")
    announce("")
    if stop:
        raise KeyboardInterrupt
    return [result for each in made for result in each.result()]


def run_job(job: CheckJob, stop: Sequence[int]) -> Iterator[Result]:
    """The results of a job. Should its process die, the check that ran has failed; the others run in a new process."""
    names = list(job.names)
    while names and not stop:
        start_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fasttune-verify-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            returncode = run_child(job, names, folder, stop)
            printed = (folder / "printed").read_text(encoding="utf-8", errors="replace")
            report = folder / "report"
            lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
        for line in map(json.loads, lines):
            if line is None:  # the check has ended
                names.pop(0)
            else:
                yield Result(**line)
        if names:
            name = names.pop(0)
            suspect = name.partition("import:")[2]
            if returncode is None:
                detail = f"no answer within {job.limit_s:.0f} s, so its process was ended"
                broken = Result(name, "fail", detail, f"{sys.executable} -X faulthandler -m fasttune.verify --json")
            else:
                broken = from_exit(name, returncode, printed, suspect)
            yield timed(broken, start_s)


def run_child(job: CheckJob, names: list[str], folder: Path, stop: Sequence[int]) -> int | None:
    """The exit code of a process that runs these checks, None where it was late; nothing of it is left running."""
    with (folder / "printed").open("w+b") as printed:
        process = subprocess.Popen(
            child_process.command("fasttune.verify.runner", job.module, str(folder / "report"), *names),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            cwd=folder,
            env=environment(job, folder),
            start_new_session=True,
        )
    deadline_s = time.monotonic() + job.limit_s
    while process.poll() is None and not stop and time.monotonic() < deadline_s:
        time.sleep(0.02)
    returncode = process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: grandchildren too
    process.wait()
    return returncode


def environment(job: CheckJob, folder: Path) -> dict[str, str]:
    """The child's environment: all temporary files and caches in `folder`."""
    env = child_process.environment()
    if job.hub != "open":
        env = {name: value for name, value in env.items() if name.lower() not in PROXIES}
    for name in (*OFFLINE, "UNSLOTH_DISABLE_STATISTICS"):
        if job.hub != "offline":  # whether the package is silent by itself is what these checks look at
            env.pop(name, None)
        elif name in OFFLINE:
            env[name] = "1"
    (folder / "tmp").mkdir()
    return env | {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "FASTTUNE_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, hardware.usable_cores() // PARALLEL)),
    }


def timed(result: Result, start_s: float) -> Result:
    return dataclasses.replace(result, seconds=round(time.monotonic() - start_s, 2))


# -- the child


def child(module: str, report: str, *names: str) -> None:
    """A result goes to `report` (JSON lines) the moment it is known, so that a crash loses only the check that crashed.

    null ends a check. stdout and stderr are one regular file: what a check printed is read back from it.
    """

    def write(document: object) -> None:
        with open(report, "a", encoding="utf-8") as file:
            file.write(json.dumps(document) + "\n")

    for name in names:
        suspect = name.partition("import:")[2]  # the module under test, where a check has one
        start_s, printed_before = time.monotonic(), os.fstat(1).st_size
        try:
            for result in importlib.import_module(module).CHECKS[name]():
                write(dataclasses.asdict(timed(with_printed(result, printed_before, suspect), start_s)))
                start_s = time.monotonic()
        except Exception as error:
            write(dataclasses.asdict(timed(from_exception(name, error, suspect), start_s)))
        write(None)


def with_printed(result: Result, printed_before: int, suspect: str) -> Result:
    """A check that passed while a loader complained did not pass: some libraries continue without their kernels."""
    if result.status != "pass":
        return result
    sys.stdout.flush()
    sys.stderr.flush()
    printed = os.pread(1, os.fstat(1).st_size - printed_before, printed_before).decode(errors="replace")
    known = explain(printed, suspect)
    if known is None or not known.fatal:
        return result
    return Result(result.name, "fail", f"{result.detail}; but {known.meaning}", known.fix)


if __name__ == "__main__":
    child(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries with threads of their own may hang or crash at interpreter exit; the results are out
