"""`fasttune bench`: every arm once, then every arm again, each time in a fresh process, until all repeats are there.

OUTPUT_DIR/  measurements.jsonl: what it is of, with the date it was begun; then a line as each measurement ends, from
             which an interrupted benchmark resumes
             bench.json  bench.html  bench.png
"""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fasttune import child_process, config as configuration, gpus, hardware, metrics, report, system
from fasttune.bench import scaling
from fasttune.bench.arms import PLAIN, WHAT
from fasttune.bench.stats import MIN_REPEATS, NO_REVISION, WARMUP_STEPS, Arm, Bench, Limit, Repeat
from fasttune.config import Config
from fasttune.core import autoconfig, prepare
from fasttune.errors import DataError, FasttuneError, OutputError, RunFailed, last_line
from fasttune.hardware import Hardware
from fasttune.metrics import Backend

CPU_STEPS, GPU_STEPS = 6, 20  # of a repeat
BUSY_LOAD = 0.25  # of the cores: what other programs may use on a CPU before the numbers are doubted
# The driver's names: https://docs.nvidia.com/deploy/nvidia-smi/ (--help-query-gpu)
THROTTLED = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")
AT_LIMIT = "sw_power_cap"  # no fault: a card at work under its own full limit says it for most of the time
WORKING = 50  # percent of a second in which kernels ran: loading counts in no draw
TOLD = 3  # differences that are named, of all

Told = Callable[[str, float], None]  # what is measured now, and the share of all measurements that are done


def checked_arms(config: Config, arms: str | None, repeats: int, steps: int | None) -> list[str]:
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
    for setting in ("plus_ratio", "refactor_every"):
        if getattr(config.lora, setting) is not None:
            raise FasttuneError(f"bench: lora.{setting} is of one arm only, so losses differ; add lora.{setting}=null")
    if config.lora.train_embeddings:
        raise FasttuneError("bench: lora.train_embeddings is of one arm only; add lora.train_embeddings=false")
    if config.model.added_tokens:
        raise FasttuneError("bench: model.added_tokens is of one arm only; add model.added_tokens=[]")
    if (init := config.lora.init) != "default":
        raise FasttuneError(f"bench: lora.init={init} is of one arm only, so losses differ; add lora.init=default")
    if config.model.quantization != "none" and (plain := [name for name in names if name in PLAIN]):
        raise FasttuneError(
            f"bench: {', '.join(plain)} train 16-bit weights, which is other work than model.quantization=nf4; add "
            "model.quantization=none, or --arms fasttune,unsloth-notebook"
        )
    if config.data.layout == "concat" and not config.data.cross_document and names != ["fasttune"]:
        raise FasttuneError(
            "bench: data.cross_document=false makes several rows of a sequence, which other arms cannot take as one; "
            "add data.cross_document=true, or --arms fasttune"
        )
    prepare.check_sources_and_model(config)
    return names


def run(
    config: Config,
    arms: list[str],
    repeats: int,
    steps: int | None,
    folder: Path,
    command: str,
    told: Told,
    processes: str | None = None,
) -> Bench:
    """Measure what is not in the folder yet; returns all of it. Raises FasttuneError for what cannot be compared.

    processes: "1,2": how `fasttune train` scales, in place of the arms.
    """
    told("preparing the job that all arms start from", 0.0)
    machine = hardware.detect(folder)
    several = scaling.arms(processes, bool(machine.gpus)) if processes else {}
    arms = list(several) or arms
    steps = steps or (GPU_STEPS if machine.gpus else CPU_STEPS)
    beside = busy(machine)
    with tempfile.TemporaryDirectory() as shared:
        facts = share(config, Path(shared), steps)
        resolved = configuration.load(Path(shared) / "config.yaml", ours=True)
        # What all measurements of a benchmark have in common: the job, the code and the kind of machine.
        job = resolved.model_dump(mode="json", exclude={"output_dir", "overwrite"})
        identity: dict[str, Any] = {"config": job, "steps": steps, "git": revision(), "versions": system.versions()}
        identity["machine"] = hardware.machine_name(machine)
        measured = Measurements(folder, identity, datetime.now(UTC).strftime("%Y-%m-%d"))
        names = arms if several else [*arms, "limit"]
        everything = [(name, number) for number in range(repeats) for name in names]
        for done, (name, number) in enumerate(everything):
            if measured.get(name, number) is None and not measured.failed(name):
                told(f"repeat {number + 1} of {repeats}: {name}", done / len(everything))
                with watched(machine) as seen:
                    if name in several:
                        result = scaling.measure(several[name], Path(shared))
                    else:
                        result = fresh_process(name, Path(shared), steps)
                objections = [*beside, *seen.pop("objections")]
                measured.add({"arm": name, "repeat": number, **result, **seen, "objections": objections})
    objections = [text for line in measured.lines for text in line["objections"]]
    if repeats < MIN_REPEATS:
        objections.append(f"{repeats} repeat{'' if repeats == 1 else 's'}, fewer than {MIN_REPEATS}")
    max_steps = config.train.max_steps
    epochs = config.train.epochs if max_steps is None else max_steps / facts["steps_per_epoch"]
    return Bench(
        name=config.name,
        command=command,
        model=config.model.name,
        method="LoRA" if config.train.method == "lora" else "full fine-tuning",
        dtype=resolved.model.dtype,
        steps=steps,
        batch_rows=config.train.batch_rows,
        max_length=resolved.model.max_length,
        job_tokens=round(epochs * facts["tokens_per_epoch"]),
        arms=[measured.arm(name, repeats, several.get(name, 1)) for name in arms],
        limit=measured.limit(repeats),
        usd_per_hour=autoconfig.price_of(config, machine)[0],
        hardware=asdict(machine),
        versions=identity["versions"],
        git=identity["git"],
        date=measured.date,
        objections=list(dict.fromkeys(objections)),
        **({"baseline": arms[0], "fastest": arms[-1]} if several else {}),
    )


def revision() -> str:
    """Of the checkout that this runs from."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return NO_REVISION
    return done.stdout.strip() or NO_REVISION


def share(config: Config, shared: Path, steps: int) -> dict[str, Any]:
    """What all arms start from, made once in a process of its own."""
    evaluation = {"every": "never", "problems": 0, "keep_best": False}
    nothing: dict[str, Any] = {"samples": 0, "eval": evaluation, "output_dir": None}
    nothing["data"] = {"eval": None, "eval_split": "test"}
    job = configuration.changed(config, train={"max_steps": steps}, **nothing)
    only = configuration.dump(job, exclude_unset=True)  # what was not written may be fitted to the model
    (shared / "job.yaml").write_text(only, encoding="utf-8")
    facts = fresh_process("share", shared, steps)
    if "user_error" in facts:
        raise FasttuneError(facts["user_error"])
    if "failure" in facts:
        raise RunFailed(f"bench: nothing was measured, the job could not be prepared: {facts['failure']}")
    if facts["full_steps_per_epoch"] < steps:
        raise DataError(
            f"data: {facts['full_steps_per_epoch']} full steps of {config.train.batch_rows} rows are too few for "
            f"--steps {steps}: lower it or train.batch_rows, or give more rows"
        )
    return facts


def fresh_process(what: str, shared: Path, steps: int) -> dict[str, Any]:
    """One measurement of worker.py; what its libraries print is dropped."""
    command = child_process.command("fasttune.bench.worker", what, str(shared), str(steps))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_process.environment())
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        if done.returncode in (-9, 137):
            return {"failure": "killed by the system, most likely out of memory"}
        return {"failure": f"ended with code {done.returncode}: {last_line(done.stderr, 'said nothing')[:300]}"}


class Measurements:
    """measurements.jsonl in a folder. Raises OutputError for one that cannot be written, or is of another identity."""

    def __init__(self, folder: Path, identity: dict[str, Any], date: str):
        self.path = folder / "measurements.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = system.read_text(self.path, "replace") if self.path.exists() else ""
        except OSError as error:
            raise OutputError(f"output: {folder} cannot be written ({error.strerror}); name another folder") from error
        first, *self.lines = self._read(text) or [identity | {"date": date}]
        then, now = (dict(_leaves({key: each.get(key) for key in identity})) for each in (first, identity))
        keys = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
        if keys:
            differ = [f"{key.removeprefix('config.')} was {then.get(key)}, is {now.get(key)}" for key in keys[:TOLD]]
            more = f" and {len(keys) - TOLD} more" if len(keys) > TOLD else ""
            raise OutputError(
                f"output: {folder} holds measurements of another job: {', '.join(differ)}{more}; "
                "name another folder with --output, or remove this one"
            )
        self.date: str = first["date"]
        whole = "".join(json.dumps(line) + "\n" for line in [first, *self.lines])
        if whole != text:
            report.write_bytes(self.path, whole.encode())

    def _read(self, text: str) -> list[dict[str, Any]]:
        """All lines; the last one only if it is whole: the end of a process, or of a machine, may have torn it."""
        found, lines = [], text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise OutputError(
                        f"output: {self.path} line {number} is no valid JSON; name another folder with --output"
                    ) from None
        return found

    def get(self, arm: str, number: int) -> dict[str, Any] | None:
        return next((line for line in self.lines if (line["arm"], line["repeat"]) == (arm, number)), None)

    def failed(self, arm: str) -> str | None:
        """Why an arm cannot do the job: it is not tried again in the same benchmark."""
        return next((line["failure"] for line in self.lines if line["arm"] == arm and "failure" in line), None)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with system.open_text(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def measured(self, name: str, repeats: int) -> list[dict[str, Any]]:
        found = [self.get(name, number) for number in range(repeats)]
        return [line for line in found if line is not None and "failure" not in line]

    def arm(self, name: str, repeats: int, processes: int = 1) -> Arm:
        lines = [line | {"backend": Backend(**line["backend"])} for line in self.measured(name, repeats)]
        known = Repeat.__dataclass_fields__
        made = [Repeat(**{key: value for key, value in line.items() if key in known}) for line in lines]
        return Arm(name, WHAT.get(name, f"`fasttune train` on {name}"), made, self.failed(name), processes)

    def limit(self, repeats: int) -> Limit | None:
        """The best of the measured matmul rates: other work on the machine only ever lowers it."""
        best = max(self.measured("limit", repeats), key=lambda line: line["tflops"], default=None)
        # The most of any arm: one that computes a shared beginning once has less to do.
        counted = max((known for line in self.lines if (known := line.get("flops_per_token"))), default=None)
        if best is None or counted is None:
            return None
        return Limit(best["tflops"], counted, best["tflops"] * 1e12 / counted, metrics.FLOPS_FORMULA, best["shapes"])


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is no dict."""
    for key, value in tree.items():
        yield from _leaves(value, f"{path}{key}.") if isinstance(value, dict) else [(path + key, value)]


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


@contextmanager
def watched(machine: Hardware) -> Iterator[dict[str, Any]]:
    """`objections` of what slows the GPU down meanwhile, and fields of Repeat on what it draws, as the driver says
    every second; filled at the end."""
    found: dict[str, Any] = {"objections": []}
    if not machine.gpus:
        yield found
        return
    reasons = [f"clocks_event_reasons.{name}" for name in (*THROTTLED, AT_LIMIT)]
    with gpus.every_second(machine.gpus[0].card, [*reasons, "power.draw", "utilization.gpu"]) as seen:
        yield found
        rows = seen()
    known = [values for values in rows if {*values} & {"Active", "Not Active"}]
    active = [name for i, name in enumerate(THROTTLED) if any(values[i] == "Active" for values in known)]
    found["objections"] += [f"the GPU was throttled ({name})" for name in active]
    found["objections"] += [] if known else ["nvidia-smi does not say whether the GPU was throttled"]
    working = [values for values in known if (gpus.number(values[-1]) or 0) >= WORKING]
    if draws := [draw for values in working if (draw := gpus.number(values[-2])) is not None]:
        found["power_w"] = statistics.mean(draws)
        found["at_power_limit"] = statistics.mean(values[len(THROTTLED)] == "Active" for values in working)
