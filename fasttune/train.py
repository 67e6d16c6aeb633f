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
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasttune import config as configuration, output, report, summary
from fasttune.config import Config
from fasttune.errors import FasttuneError, RunFailed
from fasttune.metrics import RunResult, Sample, StepMetrics
from fasttune.prepare import Job, Reporter, preflight, prepare
from fasttune.quiet import LibraryLog, library_log
from fasttune.summary import Outcome


def run(config: Config, reporter: Reporter) -> RunResult:
    """Train, write the output folder and return what happened.

    Raises FasttuneError for bad input, with nothing written. Once training has begun every ending is a RunResult and a
    run.json: completed, interrupted (SIGINT, SIGTERM: the adapter so far is saved) or failed.
    """
    started = time.perf_counter()
    folder = preflight(config)
    with library_log() as log, tempfile.TemporaryDirectory() as scratch:
        job = prepare(config, folder, reporter)
        from fasttune import model as models, samples, trainer as trainers  # torch and unsloth are loaded by now

        initial = models.save_initial(job.model, job.config.lora, Path(scratch) / "initial")
        before = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
        trainer = trainers.build(job, Path(scratch))
        begin(job, log)
        machine = summary.hardware_line(job.machine)
        reporter.start(job.config.name, machine, job.settings, job.total_steps, job.usd_per_hour)
        outcome = train(job, trainer, reporter)
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


def begin(job: Job, log: LibraryLog) -> None:
    """Make the output folder and write the resolved config into it."""
    output.create(job.folder)
    log.move_to(job.folder / "library.log")
    header = "# Resolved by fasttune; run it again with: fasttune train config.yaml\n"
    (job.folder / "config.yaml").write_text(configuration.dump(_portable(job.config), header), encoding="utf-8")


def train(job: Job, trainer: Any, reporter: Reporter) -> Outcome:
    """All optimizer steps, one line of metrics.jsonl each, flushed as they come."""
    from fasttune.trainer import StepRecorder, backend

    outcome = Outcome(warnings=list(job.warnings))
    for text in job.warnings:
        reporter.warn(text)
    lines = (job.folder / "metrics.jsonl").open("w", encoding="utf-8")

    def on_step(step: StepMetrics) -> None:
        outcome.steps.append(step)
        lines.write(json.dumps(asdict(step)) + "\n")
        lines.flush()
        if step.step == 1:
            for text in summary.broken_promises(job, trainer, backend(trainer)):
                outcome.warnings.append(text)
                reporter.warn(text)
        reporter.step(step)
        if not math.isfinite(step.loss):
            raise RunFailed(
                f"the loss of step {step.step} is {step.loss}; lower train.learning_rate or look at the data"
            )

    recorder = StepRecorder(trainer, on_step)
    trainer.add_callback(recorder)
    try:
        with lines, signals_to(recorder.stop):
            trainer.train()
    except KeyboardInterrupt:
        outcome.status, outcome.error = "interrupted", "stopped at once by a second signal"
    except Exception as error:  # every ending is reported in run.json
        outcome.status, outcome.error = "failed", _one_line(error)
        print(traceback.format_exc())  # into library.log
    finally:
        reporter.stop()
    if recorder.stopped_by is not None and outcome.status == "completed":
        outcome.status, outcome.error = "interrupted", f"stopped by {recorder.stopped_by.name}"
    return outcome


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


def _one_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, FasttuneError) else f"{type(error).__name__}: {text}"
