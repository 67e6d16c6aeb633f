"""One fine-tuning run, a straight line: config → output folder → model → data → train → save → report.

result = run(config.load("configs/quickstart.yaml"), terminal.Reporter(...))
"""

import math
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasttune import hardware, report
from fasttune.config import Config
from fasttune.core import checkpoint, journal, run_folder, summary, trackers
from fasttune.core.autoconfig import smaller
from fasttune.core.journal import Journal
from fasttune.core.prepare import Job, preflight, prepare
from fasttune.core.summary import Outcome
from fasttune.errors import FasttuneError, first_line, kind_and_line
from fasttune.metrics import RunResult
from fasttune.system import library_log
from fasttune.terminal import Reporter
from fasttune.tools import card

AT_ONCE = "stopped at once by a second signal"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(config: Config, reporter: Reporter, resume: Path | None = None) -> RunResult:
    """Train, write the output folder and return what happened. `resume`: the folder of a run to go on with.

    Raises FasttuneError for bad input, with nothing written. Once training has begun every ending is a RunResult and a
    run.json: completed, interrupted (SIGINT, SIGTERM, max_hours: state and adapter so far are saved) or failed. Until
    then run.json says `running`: a process that is killed leaves that, and `resume` does what is left.
    """
    started = time.perf_counter()
    trackers.check(config.train.report_to)
    folder = preflight(config, resume)
    with signals_to(_at_once), library_log() as log, tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        there = resume is not None and run_folder.is_run(folder)
        if there:
            held.enter_context(run_folder.hold(folder))  # before anything in it is looked at
            run_folder.refuse_completed(folder)
        start = folder / checkpoint.FOLDER / checkpoint.START
        job = prepare(config, folder, reporter, start if there and start.exists() else None)
        from fasttune.core import (
            model as models,  # torch is loaded
            resume as resuming,
            samples,
            state,
            trainer as trainers,
        )

        identity = state.identity(job)
        found = resuming.find(folder, job.model, identity, reporter.note) if resume else None
        initial = models.save_initial(job.model, job.config.lora, Path(scratch) / "initial")
        before = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
        trainer = trainers.build(job, Path(scratch), done=found.state["step"] if found else 0)
        if not there:
            job.folder, lock = run_folder.create(config, folder)
            held.enter_context(lock)
            if initial:
                run_folder.keep_start(job.folder, initial)
        journal.begin(job, log, resumed=there)
        steps = journal.read_metrics(folder, found.state["step"], job.warnings.append) if found else []
        outcome = Outcome(warnings=list(job.warnings))
        if found:
            state.restore_weights(job.model, found)
            trainer.add_callback(resuming.Resumed(trainer, found))
            outcome.go_on(found, steps)
        report.write_json(job.folder / "run.json", summary.summarize(job, outcome, trainer, started))
        machine = hardware.line(job.machine)
        reporter.start(job.config.name, machine, job.settings, job.total_steps, job.usd_per_hour)
        record = Journal(job, trainer, reporter, outcome)
        keeper, recorder = watch(job, trainer, record, outcome, identity, started)
        with signals_to(recorder.stop):
            try:
                train(job, record, outcome, keeper, recorder)
                save(job, outcome, initial)
                result = write_down(job, outcome, recorder, before, started)
            except KeyboardInterrupt:  # a second signal
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                outcome.status, outcome.error = "interrupted", AT_ONCE
                result = write_down(job, outcome, recorder, before, started)
        with suppress(KeyboardInterrupt):
            record.tracker.close()  # last: a service that hangs must not hold up what is saved
    return result


def watch(
    job: Job, trainer: Any, record: Journal, outcome: Outcome, identity: dict[str, str], started: float
) -> tuple[Any, Any]:
    """(Keeper, StepRecorder): what looks on after every step."""
    from fasttune.core.evaluation import Validator
    from fasttune.core.resume import Keeper
    from fasttune.core.trainer import StepRecorder

    validator = Validator(job, trainer.model, trainer.args.bf16)
    keeper = Keeper(job, trainer, validator, identity, started - outcome.earlier_s, outcome, record.warn)
    hours = job.config.checkpoint.max_hours
    ends_at = started + 3600 * hours if hours else math.inf
    recorder = StepRecorder(trainer, record.step, validator, keeper.after_step, ends_at)
    trainer.add_callback(recorder)
    return keeper, recorder


def train(job: Job, record: Journal, outcome: Outcome, keeper: Any, recorder: Any) -> None:
    """All optimizer steps that are left; fills `outcome`, whatever ends them."""
    validator = recorder.validator
    try:
        with record:
            if outcome.resumed_from_step is not None:
                validator.restore(outcome.held_out)
            elif validator.due(0):
                validator.measure(0)
            if outcome.done < job.total_steps:
                recorder.trainer.train()
            if recorder.stopped_by is None and validator.missing(job.total_steps):  # ended by a signal, and resumed
                validator.measure(job.total_steps)
        outcome.status = "completed"
    except KeyboardInterrupt:
        outcome.status, outcome.error = "interrupted", AT_ONCE
        return
    except Exception as error:  # every ending is reported in run.json
        outcome.status, outcome.error = "failed", _one_line(error, job)
        print(traceback.format_exc())  # into library.log
        return
    if recorder.stopped_by is not None:
        outcome.status, outcome.error = "interrupted", f"stopped by {recorder.stopped_by}"
    if outcome.done and not keeper.sound():
        outcome.status = "failed"
        outcome.error = f"the weights have diverged: begin anew with a lower train.learning_rate; {outcome.kept}"
    elif outcome.done:
        outcome.saved_step = keeper.bring_back_best(outcome.done)


def save(job: Job, outcome: Outcome, initial_adapter: Path | None) -> None:
    """Write adapter/ or model/ of a run that made at least one good step; a full disk makes the run `failed`.

    Not after a second signal: it may have come in the middle of a step of the optimizer.
    """
    from safetensors import SafetensorError

    from fasttune.core import model as models

    if outcome.saved_step is None:
        return
    full = job.config.train.method == "full"
    kind, dtype = ("model", job.plan.dtype) if full else ("adapter", None)
    try:
        models.save(job.model, job.tokenizer, job.folder / kind, initial_adapter, dtype)
        for name in run_folder.EVAL_FILES:  # scores of the weights that were there before
            (job.folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        outcome.status, outcome.error = "failed", f"{kind}/ could not be written: {why}; {outcome.kept}"


def write_down(job: Job, outcome: Outcome, recorder: Any, before: list[str], started: float) -> RunResult:
    """run.json, report and card, and before them the answers of a run that is completed. A disk that cannot take them
    makes the run `failed`.
    """
    result = summary.summarize(job, outcome, recorder.trainer, started)
    result.held_out = recorder.validator.result(outcome.saved_step)
    path = job.folder / "run.json"
    try:
        if outcome.status == "completed":  # said only when all of it is there: until then --resume does the rest
            report.write_json(path, replace(result, status="running", resume_command=summary.resume_command(job)))
            answer_again(job, result, before, recorder)
            summary.set_cost(result, outcome, started)
        report.write_html(job.folder / "report.html", result, outcome.steps)
        card.of_run(job.folder, result)
        report.write_json(path, result)
    except FasttuneError as error:
        told = f"{first_line(error)}; {outcome.kept}"
        if outcome.status == "completed":
            result.status, result.error, result.resume_command = "failed", told, summary.resume_command(job)
        else:
            result.warnings.append(told)
        with suppress(FasttuneError):
            report.write_json(path, result)
        return result
    if outcome.status == "completed":
        last = job.folder / checkpoint.FOLDER / f"step-{job.total_steps}"
        checkpoint.remove(last)
        with suppress(OSError):  # others are in it
            (last.parent / checkpoint.START).unlink(missing_ok=True)
            last.parent.rmdir()
    return result


def answer_again(job: Job, result: RunResult, before: list[str], recorder: Any) -> None:
    """The held-out problems after training; what goes wrong with them costs a warning and not the run."""
    from fasttune.core import samples

    if not job.problems:
        return
    failed = "the held-out problems were not answered after training: "
    try:
        if recorder.stopped_by is not None:
            raise KeyboardInterrupt
        with signals_to(_at_once):
            after = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
            result.samples, result.exact_match = samples.compare(job.config, job.problems, before, after)
    except KeyboardInterrupt:
        result.warnings.append(failed + "a signal ended it")
    except Exception as error:
        print(traceback.format_exc())  # into library.log
        result.warnings.append(failed + first_line(error))


def _at_once(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(number)


@contextmanager
def signals_to(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` meanwhile."""
    old = {number: signal.signal(number, handler) for number in SIGNALS}
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
