"""One fine-tuning run, a straight line: config → output folder → model → data → train → save → report.

result = run(config.load("configs/quickstart.yaml"), terminal.Reporter(...))
"""

import json
import math
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fasttune import checkpoint, config as configuration, output, report, summary
from fasttune.config import Config
from fasttune.errors import FasttuneError, RunFailed
from fasttune.metrics import RunResult, Sample, StepMetrics
from fasttune.plan import smaller
from fasttune.prepare import Job, Reporter, preflight, prepare
from fasttune.quiet import LibraryLog, library_log
from fasttune.summary import Outcome


def run(config: Config, reporter: Reporter, resume: Path | None = None) -> RunResult:
    """Train, write the output folder and return what happened. `resume`: the folder of a run to go on with.

    Raises FasttuneError for bad input, with nothing written. Once training has begun every ending is a RunResult and a
    run.json: completed, interrupted (SIGINT, SIGTERM, max_hours: state and adapter so far are saved) or failed.
    """
    started = time.perf_counter()
    folder = preflight(config, resume)
    with library_log() as log, tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        job = prepare(config, folder, reporter)
        from fasttune import model as models, resume as resuming, samples, state, trainer as trainers  # torch is loaded

        identity = state.identity(job)
        found = resuming.find(folder, identity, reporter.note) if resume else None
        initial = models.save_initial(job.model, job.config.lora, Path(scratch) / "initial")
        before = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
        trainer = trainers.build(job, Path(scratch), done=found.state["step"] if found else 0)
        held.enter_context(begin(job, log, resumed=found is not None))
        outcome = Outcome(warnings=list(job.warnings))
        if found:
            state.restore_weights(job.model, found)
            trainer.add_callback(resuming.Resumed(trainer, found))
            outcome.go_on(found, read_metrics(folder, found.state["step"]))
        machine = summary.hardware_line(job.machine)
        reporter.start(job.config.name, machine, job.settings, job.total_steps, job.usd_per_hour)
        train(job, trainer, reporter, outcome, identity, started)
        if not (folder / "metrics.jsonl").exists():
            make_again(job, outcome)
        save(job, outcome, initial)
        result = summary.summarize(job, outcome, trainer, started)
        if outcome.status == "completed":
            after = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
            result.samples = [
                Sample(problem.question, problem.reference, old, new)
                for problem, old, new in zip(job.problems, before, after, strict=True)
            ]
    report.write_json(folder / "run.json", result.as_dict())
    report.write_html(folder / "report.html", result, outcome.steps)
    return result


def begin(job: Job, log: LibraryLog, resumed: bool) -> IO[str]:
    """Make the output folder and write the resolved config into it. Returns the lock on it."""
    lock = output.create(job.folder, resumed)
    checkpoint.sweep(job.folder)
    log.move_to(job.folder / "library.log")
    header = "# Resolved by fasttune; run it again with: fasttune train config.yaml\n"
    (job.folder / "config.yaml").write_text(configuration.dump(_portable(job.config), header), encoding="utf-8")
    return lock


def make_again(job: Job, outcome: Outcome) -> None:
    """The output folder, which somebody has removed while the run wrote into it."""
    outcome.warnings.append(f"{job.folder} was removed while the run wrote into it: made again")
    job.folder.mkdir(parents=True, exist_ok=True)  # a checkpoint may have made it already
    write_metrics(job.folder, outcome.steps)
    (job.folder / "config.yaml").write_text(configuration.dump(_portable(job.config)), encoding="utf-8")


def read_metrics(folder: Path, step: int) -> list[StepMetrics]:
    """The steps of a run up to `step`, from its metrics.jsonl, as far as its lines can be read."""
    found = []
    with suppress(OSError, ValueError, TypeError):  # the end of a process, or of a machine, may have torn a line
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:step]:
            values = json.loads(line)
            found.append(StepMetrics(**(values | {"loss": math.nan if values["loss"] is None else values["loss"]})))
    return found


def write_metrics(folder: Path, steps: list[StepMetrics]) -> None:
    """metrics.jsonl with these steps, the old one until it is whole."""
    made = folder / ".metrics.jsonl"
    made.write_text("".join(report.to_json_line(asdict(step)) + "\n" for step in steps), encoding="utf-8")
    made.replace(folder / "metrics.jsonl")


def train(
    job: Job, trainer: Any, reporter: Reporter, outcome: Outcome, identity: dict[str, str], started: float
) -> None:
    """All optimizer steps that are left, one line of metrics.jsonl each, flushed as they come; fills `outcome`."""
    from fasttune.resume import Keeper
    from fasttune.trainer import StepRecorder, backend

    def warn(text: str) -> None:
        outcome.warnings.append(text)
        reporter.warn(text)

    for text in job.warnings:
        reporter.warn(text)
    write_metrics(job.folder, outcome.steps)
    lines = (job.folder / "metrics.jsonl").open("a", encoding="utf-8")
    first, rows_at_once = True, None

    def on_step(step: StepMetrics) -> None:
        nonlocal first, rows_at_once
        outcome.steps.append(step)
        lines.write(report.to_json_line(asdict(step)) + "\n")
        lines.flush()
        if first:
            for text in summary.broken_promises(job, trainer, backend(trainer)):
                warn(text)
        first = False
        if trainer.rows_at_once != rows_at_once:
            rows_at_once = trainer.rows_at_once
            warn(
                f"out of memory at step {step.step}: from here on {rows_at_once} full rows at once; the batch "
                f"stays {job.config.train.batch_rows} rows, so nothing that is learned changes"
            )
        reporter.step(step)
        if recorder.bad_in_a_row:
            warn(f"step {step.step} was not applied: {_what_is_bad(step)}; it had {job.data.describe(step.step - 1)}")
        if recorder.bad_in_a_row > job.config.train.max_bad_steps:
            raise RunFailed(
                f"{recorder.bad_in_a_row} steps in a row could not be applied, the last with {_what_is_bad(step)} on "
                f"{job.data.describe(step.step - 1)}; look at these rows, or lower train.learning_rate"
            )

    keeper = Keeper(job, trainer, identity, started - outcome.earlier_s, warn)
    hours = job.config.checkpoint.max_hours
    recorder = StepRecorder(trainer, on_step, keeper.after_step, started + 3600 * hours if hours else math.inf)
    trainer.add_callback(recorder)
    try:
        with lines, signals_to(recorder.stop):
            if (outcome.resumed_from_step or 0) < job.total_steps:
                trainer.train()
    except KeyboardInterrupt:
        outcome.status, outcome.error = "interrupted", "stopped at once by a second signal"
    except Exception as error:  # every ending is reported in run.json
        outcome.status, outcome.error = "failed", _one_line(error, job)
        print(traceback.format_exc())  # into library.log
    finally:
        reporter.stop()
    if recorder.stopped_by is not None and outcome.status == "completed":
        outcome.status, outcome.error = "interrupted", f"stopped by {recorder.stopped_by}"
    outcome.checkpoint = keeper.last or outcome.checkpoint


def _what_is_bad(step: StepMetrics) -> str:
    return "a gradient that is not finite" if math.isfinite(step.loss) else f"a loss of {step.loss}"


def save(job: Job, outcome: Outcome, initial_adapter: Path | None) -> None:
    """Write adapter/ or model/ of a run that made at least one good step; a full disk makes the run `failed`."""
    from fasttune import model as models

    if not outcome.steps or outcome.status == "failed":
        return
    kind = "model" if job.config.train.method == "full" else "adapter"
    try:
        models.save(job.model, job.tokenizer, job.folder / kind, initial_adapter)
    except OSError as error:
        outcome.status, outcome.error = "failed", f"{kind}/ could not be written: {error.strerror or error}"


@contextmanager
def signals_to(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` while training runs."""
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def _portable(config: Config) -> Config:
    """As config.yaml keeps it: local paths absolute, and no output folder, so that it can be run again as it is."""

    def absolute(name: str | None) -> str | None:
        path = Path(name).expanduser() if name and not name.startswith("builtin:") else None
        return str(path.resolve()) if path and path.exists() else name

    train = config.data.train
    named = absolute(train) if isinstance(train, str) else {absolute(name): weight for name, weight in train.items()}
    data = config.data.model_copy(update={"train": named, "eval": absolute(config.data.eval)})
    model = config.model.model_copy(update={"name": absolute(config.model.name)})
    return config.model_copy(update={"data": data, "model": model, "output_dir": None, "overwrite": False})


def _one_line(error: Exception, job: Job) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory with the fewest rows at once; try, in this order: {'; '.join(smaller(job.config))}"
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, FasttuneError) else f"{type(error).__name__}: {text}"
