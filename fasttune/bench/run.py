"""`fasttune bench`: every arm once, then every arm again, each time in a fresh process, until all repeats are there.

OUTPUT_DIR/  measurements.jsonl (one line as each ends; an interrupted benchmark goes on from there)
             bench.json  bench.html  bench.png
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fasttune import config as configuration, errors, gpus, hardware, system
from fasttune.bench.arms import PLAIN, WHAT
from fasttune.bench.measurements import Measurements
from fasttune.bench.result import MIN_REPEATS, WARMUP_STEPS, Bench
from fasttune.config import Config, EvalConfig
from fasttune.core import autoconfig, prepare
from fasttune.errors import DataError, FasttuneError, RunFailed, last_line
from fasttune.hardware import Hardware
from fasttune.tools import estimate

CPU_STEPS, GPU_STEPS = 6, 20  # of a repeat
BUSY_LOAD = 0.25  # of the cores: what other programs may use on a CPU before the numbers are doubted
USER_ERRORS = {  # as worker.py names them
    each.__name__ for each in (FasttuneError, errors.ConfigError, DataError, errors.ModelError, errors.OutputError)
}
# The driver's names: https://docs.nvidia.com/deploy/nvidia-smi/ (--help-query-gpu)
THROTTLED = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")
AT_LIMIT = "sw_power_cap"  # no fault: a card at work under its own full limit says it for most of the time
REASONS = [f"clocks_event_reasons.{name}" for name in (*THROTTLED, AT_LIMIT)]
WORKING = 50  # percent of a second in which kernels ran: loading counts in no draw

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
    if config.model.quantization != "none" and (plain := [name for name in names if name in PLAIN]):
        raise FasttuneError(
            f"bench: {', '.join(plain)} train 16-bit weights, which is other work than model.quantization=nf4; add "
            "model.quantization=none, or --arms fasttune,unsloth-notebook"
        )
    prepare.check(config)
    return names


def run(
    config: Config, arms: list[str], repeats: int, steps: int | None, folder: Path, command: str, told: Told
) -> Bench:
    """Measure what is not in the folder yet; returns all of it. Raises FasttuneError for what cannot be compared."""
    machine = hardware.detect(folder)
    steps = steps or (GPU_STEPS if machine.gpus else CPU_STEPS)
    beside = busy(machine)
    with tempfile.TemporaryDirectory() as shared:
        facts = share(config, Path(shared), steps)
        resolved = configuration.load(Path(shared) / "config.yaml", ours=True)
        identity = identify(resolved, steps, machine)
        measured = Measurements(folder, identity, datetime.now(UTC).strftime("%Y-%m-%d"))
        all_of_it = [(name, number) for number in range(repeats) for name in [*arms, "limit"]]
        for done, (name, number) in enumerate(all_of_it):
            if measured.get(name, number) is None and not measured.failed(name):
                told(f"repeat {number + 1} of {repeats}: {name}", done / len(all_of_it))
                with watched(machine) as seen:
                    result = fresh_process(name, Path(shared), steps)
                measured.add(name, number, result | seen.power, [*beside, *seen.objections])
    objections = measured.objections()
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
        max_length=resolved.model.max_length,
        job_tokens=job_tokens(config, facts),
        arms=[measured.arm(name, repeats) for name in arms],
        limit=measured.limit(repeats),
        usd_per_hour=autoconfig.price_of(config, machine)[0],
        hardware=asdict(machine),
        versions=identity["versions"],
        git=identity["git"],
        date=measured.date,
        objections=list(dict.fromkeys(objections)),
    )


def identify(config: Config, steps: int, machine: Hardware) -> dict[str, Any]:
    """What all measurements of a benchmark have in common: the job, the code and the kind of machine."""
    return {
        "config": config.model_dump(mode="json", exclude={"output_dir", "overwrite"}),
        "steps": steps,
        "git": _git(),
        "versions": system.versions(),
        "machine": estimate.machine_name(machine),
    }


def share(config: Config, shared: Path, steps: int) -> dict[str, Any]:
    """What all arms start from, made once in a process of its own."""
    train = config.train.model_copy(update={"max_steps": steps})
    data = config.data.model_copy(update={"eval": None})
    nothing = {"samples": 0, "eval": EvalConfig(every="never"), "output_dir": None}
    job = config.model_copy(update={"train": train, "data": data, **nothing})
    only = configuration.dump(job, exclude_unset=True)  # what was not written may be fitted to the model
    (shared / "job.yaml").write_text(only, encoding="utf-8")
    facts = fresh_process("share", shared, steps)
    if "failure" in facts:
        kind, _, text = facts["failure"].partition(": ")
        if kind in USER_ERRORS:
            raise FasttuneError(text)
        raise RunFailed(f"bench: nothing was measured, the job could not be prepared: {facts['failure']}")
    if facts["full_steps_per_epoch"] < steps:
        raise DataError(
            f"data: {facts['full_steps_per_epoch']} full steps of {config.train.batch_rows} rows are too few for "
            f"--steps {steps}: lower it or train.batch_rows, or give more rows"
        )
    return facts


def fresh_process(what: str, shared: Path, steps: int) -> dict[str, Any]:
    """One measurement of worker.py; what its libraries print is dropped."""
    command = system.child_command("fasttune.bench.worker", what, str(shared), str(steps))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=system.child_environment())
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        if done.returncode in (-9, 137):
            return {"failure": "killed by the system, most likely out of memory"}
        return {"failure": f"ended with code {done.returncode}: {last_line(done.stderr, 'said nothing')[:300]}"}


def job_tokens(config: Config, facts: dict[str, Any]) -> int:
    """Tokens of the user's whole job, all epochs."""
    steps = config.train.max_steps
    epochs = config.train.epochs if steps is None else steps / facts["steps_per_epoch"]
    return round(epochs * facts["tokens_per_epoch"])


def busy(machine: Hardware) -> list[str]:
    """What else is on the machine: refuses a GPU that another process uses; objections to the numbers otherwise."""
    if not machine.gpus:
        load = os.getloadavg()[0] / machine.cores
        told = f"other programs ran beside it (load {load:.0%} of the cores before the start)"
        return [told] if load > BUSY_LOAD else []
    gpu = machine.gpus[0]
    if gpu.sliced:
        return ["it is a slice of a card: what the other slices do is not known"]
    others = gpus.smi("--query-compute-apps=pid,process_name", "--format=csv,noheader", "-i", gpu.card).splitlines()
    if others:
        raise FasttuneError(f"bench: another process is on the GPU ({others[0]}): end it, or wait for it")
    return list(filter(None, [gpus.capped(gpu)]))


@dataclass
class Watch:
    """What the driver said while something was measured; `power` are fields of Repeat."""

    objections: list[str] = field(default_factory=list)
    power: dict[str, float] = field(default_factory=dict)


@contextmanager
def watched(machine: Hardware) -> Iterator[Watch]:
    """What slows the GPU down meanwhile, and what it draws, as the driver says every second; filled at the end."""
    found = Watch()
    if not machine.gpus:
        yield found
        return
    query = f"--query-gpu={','.join([*REASONS, 'power.draw', 'utilization.gpu'])}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "--loop=1", "-i", machine.gpus[0].card]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        watch = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            watch.terminate()
            watch.wait()
            said.seek(0)
            seen = [[value.strip() for value in line.split(",")] for line in said]
    known = [values for values in seen if len(values) == len(REASONS) + 2 and {*values} & {"Active", "Not Active"}]
    active = [name for i, name in enumerate(THROTTLED) if any(values[i] == "Active" for values in known)]
    found.objections += [f"the GPU was throttled ({name})" for name in active]
    found.objections += [] if known else ["nvidia-smi does not say whether the GPU was throttled"]
    working = [values for values in known if (gpus.number(values[-1]) or 0) >= WORKING]
    if draws := [draw for values in working if (draw := gpus.number(values[-2])) is not None]:
        found.power["power_w"] = statistics.mean(draws)
        at_limit = [values[len(THROTTLED)] == "Active" for values in working]
        found.power["at_power_limit"] = statistics.mean(at_limit)


def _git() -> str:
    """The revision of the checkout this runs from; an installed package has none."""
    if shutil.which("git") is None:
        return "not a checkout"
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or "not a checkout"
