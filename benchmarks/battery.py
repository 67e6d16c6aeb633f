#!/usr/bin/env python3
"""Every measurement for a GPU machine, one stage after the other (benchmarks/stages.py); gpu_battery.sh starts it.

OUT/results.jsonl gets a line as each stage ends, with everything it found; OUT/STAGE/ is the folder of its benchmark.
The same command resumes from there: stages that are done are skipped, a benchmark that ran out of its minutes
continues with its next repeat. The model (16 GB) and the wheels go to --scratch.
Exit 0, 1 if a stage failed or is unfinished, 2 for wrong input, 130 when interrupted.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages import INPUTS, STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
LAST_LINES = 40  # of a stage that did not end well
GRACE_S = 20  # after SIGINT: a benchmark leaves nothing half-written
DONE = ("ok", "skipped")
DRY_RUN_MINUTES = 5
LEAST_MINUTES = 2  # for a benchmark to begin in: it resumes at the next call, with the repeats that are missing


def main() -> int:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fasttune-battery-", ignore_cleanup_errors=True) as temporary:
        default = Path(temporary) if options.dry_run else Path(tempfile.gettempdir()) / "fasttune-battery"
        scratch = (options.scratch or default).absolute()
        out = (options.out or (scratch / "out" if options.dry_run else ROOT / "runs" / "battery")).absolute()
        for folder in (scratch, out):
            folder.mkdir(parents=True, exist_ok=True)
        if not options.dry_run:
            sys.path.append(str(ROOT))
            from fasttune import errors, gpus

            try:
                gpus.pin()  # of several GPUs all stages take the same one
            except errors.FasttuneError as error:
                return refuse(str(error))
        battery = Battery(options, out, scratch, install(options.wheels, scratch))
        try:
            battery.run([stage for stage in STAGES if stage.name in options.stages])
        except KeyboardInterrupt:
            print("battery: interrupted; the same command resumes from here", file=sys.stderr)
            return 130
        return battery.summary()


def parse(argv: list[str]) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="gpu_battery.sh",
        description=__doc__,
        epilog="stages: " + ", ".join(names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to install into a private folder")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="default $OUT, or runs/battery")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="needs 20 GB (default: in the temporary folder)")
    parser.add_argument("--stages", default=",".join(names), metavar="A,B", help="only these")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="N",
        help="be done by then; a benchmark resumes next time",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every stage on the CPU, with a tiny model, nothing is kept"
    )
    options = parser.parse_args(argv)
    options.stages = [name.strip() for name in options.stages.split(",")]
    if unknown := [name for name in options.stages if name not in names]:
        parser.error(f"--stages: {', '.join(unknown)} unknown; choose from {', '.join(names)}")
    return options


def install(wheels: Path | None, scratch: Path) -> list[str]:
    """Folders for PYTHONPATH: the wheels, installed where no other program sees them, then the checkout."""
    if wheels is None:
        return [str(ROOT)]
    files = sorted(wheels.absolute().glob("*.whl"))
    if not files:
        raise SystemExit(refuse(f"--wheels {wheels}: no .whl file is there"))
    site = scratch / ("site-" + hashlib.sha256(" ".join(file.name for file in files).encode()).hexdigest()[:12])
    if not site.exists():
        with tempfile.TemporaryDirectory(dir=scratch) as made:
            target = Path(made) / "site"
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-index",
                "--no-deps",
                "--no-cache-dir",
                "--no-compile",
            ]
            command += ["--target", str(target), *map(str, files)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
                raise SystemExit(refuse(f"--wheels {wheels}: {lines[-1]}"))
            target.rename(site)
    sys.path.insert(0, str(site))  # where `needs` is looked up
    return [str(site), str(ROOT)]


def refuse(problem: str) -> int:
    print(f"battery: {problem}", file=sys.stderr)
    return 2


class Battery:
    """Runs stages and keeps what came of them in results.jsonl; the last line of a name counts."""

    def __init__(self, options: argparse.Namespace, out: Path, scratch: Path, python_path: list[str]):
        self.options, self.out, self.results = options, out, out / "results.jsonl"
        cache = scratch / "cache"
        self.places = {"python": sys.executable, "out": str(out), "rows": str(cache / "battery/rows-2")}
        self.places["model"] = str(cache / "battery" / ("model-tiny" if options.dry_run else "model-8b"))
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*python_path, *inherited]),
            "FASTTUNE_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
        }
        if options.dry_run:  # two stages at once, and matrices that one core is enough for
            self.environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.started = time.monotonic()
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.outcomes: dict[str, dict[str, Any]] = {}

    def run(self, stages: list[Stage]) -> None:
        """All stages that are not done yet; in a dry run two at a time."""
        kept = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        done = {row["stage"]: row for row in map(json.loads, kept)}
        self.outcomes = {s.name: done[s.name] for s in stages if done.get(s.name, {}).get("status") in DONE}
        left = [stage for stage in stages if stage.name not in self.outcomes]
        if any("{model}" in stage.command for stage in left):
            for stage in INPUTS:
                self.add(stage)
        with ThreadPoolExecutor(2 if self.options.dry_run else 1) as pool:
            try:
                list(pool.map(self.add, left))
            except KeyboardInterrupt:
                self.stop.set()
                raise

    def add(self, stage: Stage) -> None:
        """Run a stage and write its line."""
        if self.stop.is_set():
            return
        started = datetime.now(UTC).isoformat(timespec="seconds")
        command = stage.command
        if self.options.dry_run:
            command = stage.small if stage.small.startswith("skip: ") else f"{command} {stage.small}"
        begun = time.monotonic()
        row = self.outcome(stage, command)
        row = {"stage": stage.name, "started": started, "seconds": round(time.monotonic() - begun, 1)} | row
        row |= {"command": command, "dry_run": self.options.dry_run, "source": source_digest(ROOT)}
        with self.lock:
            self.outcomes[stage.name] = row
            print(line(row), file=sys.stderr, flush=True)
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def outcome(self, stage: Stage, command: str) -> dict[str, Any]:
        """status: ok, failed, unfinished (its minutes were over), skipped or not run, with the reason."""
        if command.startswith("skip: "):
            return {"status": "skipped", "reason": command.removeprefix("skip: ").strip()}
        if stage.needs and importlib.util.find_spec(stage.needs) is None:
            return {"status": "skipped", "reason": f"{stage.needs} is not installed"}
        left = self.options.minutes - (time.monotonic() - self.started) / 60
        resumes = "fasttune.cli bench" in command
        if left < (min(LEAST_MINUTES, stage.minutes) if resumes else stage.minutes):
            return {"status": "not run", "reason": f"{stage.minutes} minutes, {left:.1f} are left"}
        minutes = min(stage.minutes, left)
        words = [word.format(stage=stage.name, **self.places) for word in shlex.split(command)]
        code, output, errors = self.child(words, minutes * 60)
        lines = [text for text in (output + errors).splitlines() if text.strip()]
        found = {"exit": code, "result": last_json(output)}
        if code == 0:
            return {"status": "ok", **found}
        if code is None:
            reason = "interrupted" if self.stop.is_set() else f"its {minutes:.0f} minutes were over: run this again"
            return {"status": "unfinished", "reason": reason, **found, "last": lines[-LAST_LINES:]}
        return {
            "status": "failed",
            "reason": lines[-1] if lines else "said nothing",
            **found,
            "last": lines[-LAST_LINES:],
        }

    def child(self, words: list[str], limit_s: float) -> tuple[int | None, str, str]:
        """Exit code (None: stopped at its limit), stdout and stderr of a process that never outlives this one."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                words, stdout=output, stderr=errors, cwd=ROOT, env=self.environment, start_new_session=True
            )
            deadline = time.monotonic() + limit_s
            try:
                while process.poll() is None and time.monotonic() < deadline and not self.stop.wait(0.1):
                    pass
                over = process.poll() is None
                if over:
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
                process.wait()
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read())
            return None if over else process.returncode, texts[0], texts[1]

    def summary(self) -> int:
        print(f"\n{'stage':24}{'status':12}{'seconds':>9}  result")
        for row in self.outcomes.values():
            print(line(row))
        bad = [row for row in self.outcomes.values() if row["status"] not in DONE]
        if self.options.dry_run:
            print(f"dry run: {(time.monotonic() - self.started) / 60:.1f} minutes; these numbers mean nothing")
        else:
            print(f"{len(self.outcomes) - len(bad)} of {len(self.outcomes)} stages done; {self.results}")
        return 1 if bad else 0


def line(row: dict[str, Any]) -> str:
    """A stage on one line of the table."""
    return f"{row['stage']:24}{row['status']:12}{row['seconds']:9.1f}  {row.get('reason') or figures(row['result'])}"


def figures(result: Any) -> str:
    """The figures of a benchmark that fit on a line."""
    if not isinstance(result, dict) or "arms" not in result:
        return ""
    speeds = [(arm["name"], (arm.get("tokens_per_s") or {}).get("median")) for arm in result["arms"]]
    return ", ".join(f"{name} {speed:,.0f}" if speed else f"{name} failed" for name, speed in speeds) + " tokens/s"


def last_json(text: str) -> Any:
    """The JSON document in the last line of stdout, if there is one."""
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None


def source_digest(root: Path) -> str:
    """Hash of fasttune's sources: a machine without git can so be held against a revision (add_result.py)."""
    digest = hashlib.sha256()
    for path in sorted((root / "fasttune").rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
