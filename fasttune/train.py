"""One fine-tuning run, a straight line: config → output folder → model → data → train → save → report.

result = run(config.load("configs/quickstart.yaml"), terminal.Reporter(...))
"""

import math
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fasttune import hardware, report
from fasttune.after import card
from fasttune.config import Config
from fasttune.errors import FasttuneError, first_line, kind_and_line
from fasttune.metrics import RunResult
from fasttune.plan import smaller
from fasttune.quiet import library_log
from fasttune.terminal import Reporter
from fasttune.training import journal, summary, tracking
from fasttune.training.journal import Journal
from fasttune.training.prepare import Job, preflight, prepare
from fasttune.training.summary import Outcome

AT_ONCE = "stopped at once by a second signal"


def run(config: Config, reporter: Reporter, resume: Path | None = None) -> RunResult:
    """Train, write the output folder and return what happened. `resume`: the folder of a run to go on with.

    Raises FasttuneError for bad input, with nothing written. Once training has begun every ending is a RunResult and a
    run.json: completed, interrupted (SIGINT, SIGTERM, max_hours: state and adapter so far are saved) or failed.
    """
    started = time.perf_counter()
    tracking.check(config.train.report_to)
    folder = preflight(config, resume)
    with library_log() as log, tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        job = prepare(config, folder, reporter)
        from fasttune import model as models  # torch is loaded
        from fasttune.training import resume as resuming, samples, state, trainer as trainers

        identity = state.identity(job)
        found = resuming.find(folder, identity, reporter.note) if resume else None
        initial = models.save_initial(job.model, job.config.lora, Path(scratch) / "initial")
        before = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
        trainer = trainers.build(job, Path(scratch), done=found.state["step"] if found else 0)
        held.enter_context(journal.begin(job, log, resumed=found is not None))
        outcome = Outcome(warnings=list(job.warnings))
        if found:
            state.restore_weights(job.model, found)
            trainer.add_callback(resuming.Resumed(trainer, found))
            outcome.go_on(found, journal.read_metrics(folder, found.state["step"]))
        machine = hardware.line(job.machine)
        reporter.start(job.config.name, machine, job.settings, job.total_steps, job.usd_per_hour)
        record = Journal(job, trainer, reporter, outcome)
        held.callback(record.tracker.close)  # last: a service that hangs must not hold up what is saved
        validator = train(job, trainer, record, outcome, identity, started)
        save(job, outcome, initial)
        result = summary.summarize(job, outcome, trainer, started)
        result.held_out = validator.result(outcome.saved_step)
        report.write_json(folder / "run.json", result)  # what comes now is only for the report
        if outcome.status == "completed":
            answer_again(job, result, before)
            summary.set_cost(result, outcome, started)
        report.write_json(folder / "run.json", result)
        report.write_html(folder / "report.html", result, outcome.steps)
        card.of_run(folder)
    return result


def train(job: Job, trainer: Any, record: Journal, outcome: Outcome, identity: dict[str, str], started: float) -> Any:
    """All optimizer steps that are left; fills `outcome`, whatever ends them. Returns the Validator."""
    from fasttune.training.resume import Keeper
    from fasttune.training.trainer import StepRecorder
    from fasttune.training.validation import Validator

    validator = Validator(job, trainer.model, trainer.args.bf16)
    keeper = Keeper(job, trainer, validator, identity, started - outcome.earlier_s, record.warn)
    hours = job.config.checkpoint.max_hours
    ends_at = started + 3600 * hours if hours else math.inf
    recorder = StepRecorder(trainer, record.step, validator, keeper.after_step, ends_at)
    trainer.add_callback(recorder)
    try:
        with record, signals_to(recorder.stop):
            if outcome.resumed_from_step is not None:
                validator.restore(outcome.held_out)
            elif validator.due(0):
                validator.measure(0)
            if (outcome.resumed_from_step or 0) < job.total_steps:
                trainer.train()
            if recorder.stopped_by is None and validator.missing(job.total_steps):  # ended by a signal, and resumed
                validator.measure(job.total_steps)
    except KeyboardInterrupt:
        outcome.status, outcome.error = "interrupted", AT_ONCE
    except Exception as error:  # every ending is reported in run.json
        outcome.status, outcome.error = "failed", _one_line(error, job)
        print(traceback.format_exc())  # into library.log
    if recorder.stopped_by is not None and outcome.status == "completed":
        outcome.status, outcome.error = "interrupted", f"stopped by {recorder.stopped_by}"
    outcome.checkpoint = keeper.last or outcome.checkpoint
    if outcome.status != "failed" and outcome.error != AT_ONCE and outcome.steps:
        outcome.saved_step = keeper.bring_back_best(outcome.steps[-1].step)
    return validator


def save(job: Job, outcome: Outcome, initial_adapter: Path | None) -> None:
    """Write adapter/ or model/ of a run that made at least one good step; a full disk makes the run `failed`.

    Not after a second signal: it may have come in the middle of a step of the optimizer.
    """
    from safetensors import SafetensorError

    from fasttune import model as models

    if not outcome.steps or outcome.status == "failed" or outcome.error == AT_ONCE:
        return
    kind = "model" if job.config.train.method == "full" else "adapter"
    try:
        models.save(job.model, job.tokenizer, job.folder / kind, initial_adapter)
    except (OSError, SafetensorError) as error:
        outcome.status, outcome.error = "failed", f"{kind}/ could not be written: {getattr(error, 'strerror', error)}"


def answer_again(job: Job, result: RunResult, before: list[str]) -> None:
    """The held-out problems after training; what goes wrong with them costs a warning and not the run."""
    from fasttune.training import samples

    try:
        after = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
        result.samples, result.exact_match = samples.compare(job.config, job.problems, before, after)
    except (Exception, KeyboardInterrupt) as error:
        print(traceback.format_exc())  # into library.log
        result.warnings.append(f"the held-out problems were not answered after training: {first_line(error)}")


@contextmanager
def signals_to(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` while training runs."""
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def _one_line(error: Exception, job: Job) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        ways = smaller(job.config, bool(job.machine.gpus))
        return f"out of memory with the fewest rows at once; try, in this order: {'; '.join(ways)}"
    return first_line(error) if isinstance(error, FasttuneError) else kind_and_line(error)
