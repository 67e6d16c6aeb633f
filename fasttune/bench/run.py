"""`fasttune bench`: every arm once, then every arm again, each time in a fresh process, until all repeats are there.

OUTPUT_DIR/  job.json  measurements.jsonl (one line as each ends; an interrupted benchmark goes on from there)
             bench.json  bench.html  bench.png
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fasttune import config as configuration, hardware, metrics, prepare, stack
from fasttune.bench.arms import WHAT
from fasttune.bench.result import MIN_REPEATS, WARMUP_STEPS, Arm, Bench, Limit, Repeat
from fasttune.config import Config, EvalConfig
from fasttune.errors import DataError, FasttuneError, OutputError, RunFailed, last_line
from fasttune.hardware import Hardware
from fasttune.metrics import Backend

CPU_STEPS, GPU_STEPS = 6, 20  # of a repeat
BUSY_LOAD = 0.25  # of the cores: what other programs may use on a CPU before the numbers are doubted

Told = Callable[[str, float], None]  # what is measured now, and the share of all measurements that are done


def check(config: Config, arms: str | None, repeats: int, steps: int | None) -> list[str]:
    """The arms to run. Raises FasttuneError for what cannot be measured, before anything heavy is imported."""
    names = [name.strip() for name in arms.split(",")] if arms else list(WHAT)
    if unknown := [name for name in names if name not in WHAT]:
        raise FasttuneError(f"--arms: {', '.join(unknown)} unknown; choose from {', '.join(WHAT)}")
    if repeats < 1:
        raise FasttuneError(f"--repeats {repeats}: at least 1, and at least {MIN_REPEATS} for a claim")
    if steps is not None and steps <= WARMUP_STEPS:
        raise FasttuneError(f"--steps {steps}: at least {WARMUP_STEPS + 1}, the first warms up")
    if config.lora.dropout and config.train.method == "lora":
        raise FasttuneError(
            f"bench: lora.dropout={config.lora.dropout:g} draws other numbers in every arm, so their losses cannot be "
            "compared; add lora.dropout=0"
        )
    if config.lora.init != "default":
        raise FasttuneError("bench: lora.init=pissa changes the base weights of one arm only; add lora.init=default")
    prepare.check(config)
    return names


def run(
    config: Config, arms: list[str], repeats: int, steps: int | None, folder: Path, command: str, told: Told
) -> Bench:
    """Measure what is not in the folder yet; returns all of it. Raises FasttuneError for what cannot be compared."""
    machine = hardware.detect(folder)
    steps = steps or (GPU_STEPS if machine.gpus else CPU_STEPS)
    objections = busy(machine)
    with tempfile.TemporaryDirectory() as shared:
        facts = share(config, Path(shared), steps)
        resolved = configuration.load(Path(shared) / "config.yaml")
        measured = Measurements(folder, resolved, steps)
        plan = [(name, number) for number in range(repeats) for name in [*arms, "limit"]]
        for done, (name, number) in enumerate(plan):
            if measured.get(name, number) is None and not measured.failed(name):
                told(f"repeat {number + 1} of {repeats}: {name}", done / len(plan))
                measured.add(name, number, fresh_process(name, Path(shared), steps))
    objections += throttled(machine)
    if repeats < MIN_REPEATS:
        objections.append(f"{repeats} repeats, fewer than {MIN_REPEATS}")
    return Bench(
        name=config.name,
        command=command,
        model=config.model.name,
        method="LoRA" if config.train.method == "lora" else "full fine-tuning",
        dtype=resolved.model.dtype,
        steps=steps,
        batch_rows=config.train.batch_rows,
        max_length=config.model.max_length,
        job_tokens=job_tokens(config, facts),
        arms=[measured.arm(name, repeats) for name in arms],
        limit=measured.limit(repeats),
        usd_per_hour=price(config, machine),
        hardware=asdict(machine),
        versions=stack.versions(),
        git=_git(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        objections=list(dict.fromkeys(objections)),
    )


def share(config: Config, shared: Path, steps: int) -> dict[str, Any]:
    """What all arms start from, made once in a process of its own."""
    train = config.train.model_copy(update={"max_steps": steps})
    data = config.data.model_copy(update={"eval": None})
    nothing = {"samples": 0, "eval": EvalConfig(every="never"), "output_dir": None}
    job = config.model_copy(update={"train": train, "data": data, **nothing})
    (shared / "job.yaml").write_text(configuration.dump(job), encoding="utf-8")
    facts = fresh_process("share", shared, steps)
    if "failure" in facts:
        kind, _, text = facts["failure"].partition(": ")
        raise (DataError if kind.endswith("Error") else RunFailed)(text)
    if facts["full_steps_per_epoch"] < steps:
        raise DataError(
            f"data: {facts['full_steps_per_epoch']} full steps of {config.train.batch_rows} rows are too few for "
            f"--steps {steps}: lower it or train.batch_rows, or give more rows"
        )
    return facts


def fresh_process(what: str, shared: Path, steps: int) -> dict[str, Any]:
    """One measurement of worker.py; what its libraries print is dropped."""
    command = [sys.executable, "-m", "fasttune.bench.worker", what, str(shared), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        if done.returncode in (-9, 137):
            return {"failure": "killed by the system, most likely out of memory"}
        return {"failure": f"ended with code {done.returncode}: {last_line(done.stderr, 'said nothing')[:300]}"}


class Measurements:
    """measurements.jsonl: what has been measured of this very job, so that an interrupted benchmark can go on."""

    def __init__(self, folder: Path, config: Config, steps: int):
        self.path = folder / "measurements.jsonl"
        job = {"config": config.model_dump(mode="json", exclude={"output_dir", "overwrite"}), "steps": steps}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            if not lines:
                self.path.write_text(json.dumps(job) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"output: {folder} cannot be written ({error.strerror}); name another folder") from error
        if lines and json.loads(lines[0]) != job:
            raise OutputError(
                f"output: {folder} holds measurements of another job; name another folder with --output, or remove it"
            )
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]

    def get(self, arm: str, number: int) -> dict[str, Any] | None:
        return next((line for line in self.lines if (line["arm"], line["repeat"]) == (arm, number)), None)

    def failed(self, arm: str) -> str | None:
        """Why an arm cannot do the job: it is not tried again in the same benchmark."""
        return next((line["failure"] for line in self.lines if line["arm"] == arm and "failure" in line), None)

    def add(self, arm: str, number: int, result: dict[str, Any]) -> None:
        line = {"arm": arm, "repeat": number, **result}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def arm(self, name: str, repeats: int) -> Arm:
        lines = [line for number in range(repeats) if (line := self.get(name, number)) and "failure" not in line]
        fields = Repeat.__dataclass_fields__
        found = [
            Repeat(**{key: line[key] for key in fields if key != "backend"}, backend=Backend(**line["backend"]))
            for line in lines
        ]
        return Arm(name, WHAT[name], found, self.failed(name))

    def limit(self, repeats: int) -> Limit | None:
        """The best of the measured matmul rates: other work on the machine only ever lowers it."""
        rates = [line for number in range(repeats) if (line := self.get("limit", number)) and "failure" not in line]
        # The most of any arm: one that computes a shared beginning once has less to do.
        counted = max((known for line in self.lines if (known := line.get("flops_per_token"))), default=None)
        if not rates or counted is None:
            return None
        best = max(rates, key=lambda line: line["tflops"])
        return Limit(best["tflops"], counted, best["tflops"] * 1e12 / counted, metrics.FLOPS_FORMULA, best["shapes"])


def job_tokens(config: Config, facts: dict[str, Any]) -> int:
    """Tokens of the user's whole job, all epochs."""
    steps = config.train.max_steps
    epochs = config.train.epochs if steps is None else steps / facts["steps_per_epoch"]
    return round(epochs * facts["tokens_per_epoch"])


def price(config: Config, machine: Hardware) -> float | None:
    if config.usd_per_hour is not None or not machine.gpus:
        return config.usd_per_hour
    return hardware.usd_per_hour(machine.gpus[0].name)


def busy(machine: Hardware) -> list[str]:
    """Refuse a GPU that another process uses; on a CPU, say so when other programs run."""
    if machine.gpus:
        others = _smi("--query-compute-apps=pid,process_name")
        if others:
            raise FasttuneError(f"bench: another process is on the GPU ({others[0]}): end it, or wait for it")
        return []
    time.sleep(0.1)
    load = os.getloadavg()[0] / machine.cores
    return [f"other programs ran beside it (load {load:.0%} of the cores before the start)"] if load > BUSY_LOAD else []


def throttled(machine: Hardware) -> list[str]:
    """What slowed the GPU down while it was measured, as the driver counts it."""
    if not machine.gpus:
        return []
    names = ["clocks_event_reasons.hw_thermal_slowdown", "clocks_event_reasons.sw_thermal_slowdown"]
    names += ["clocks_event_reasons.hw_power_brake_slowdown"]
    active = [line.split(", ") for line in _smi(f"--query-gpu={','.join(names)}")]
    found = [name for values in active for name, value in zip(names, values, strict=False) if value.strip() == "Active"]
    return [f"the GPU was throttled ({name.rpartition('.')[2]})" for name in found]


def _smi(query: str) -> list[str]:
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.strip()]


def _git() -> str:
    """The revision of the checkout this runs from; an installed package has none."""
    if shutil.which("git") is None:
        return "not a checkout"
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "not a checkout"
