"""One fine-tuning run, a straight line: config → model and data (prepare.py) → output folder → train → save → report.

result = run(config.load("configs/quickstart.yaml"), terminal.Reporter(...))
"""

import math
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fasttune import hardware, report
from fasttune.config import Config, changed
from fasttune.core import checkpoint, run_folder
from fasttune.core.prepare import Job, preflight, prepare
from fasttune.core.ranks import ALONE, Ranks
from fasttune.core.run_folder import Journal
from fasttune.core.stops import SIGNALS, Stops, at_once, signals_to
from fasttune.errors import FasttuneError, first_line, kind_and_line
from fasttune.metrics import ExactMatch, RunResult, Sample, Stopped
from fasttune.system import library_log
from fasttune.terminal import Reporter

if TYPE_CHECKING:
    from fasttune.core.trainer import StepRecorder

MATMUL_SECONDS = 1.0  # spent after the run on measuring this machine's matmul rate


def run(
    config: Config,
    reporter: Reporter,
    resume: Path | None = None,
    when_ready: Callable[[Job], None] = lambda job: None,
    when_saved: Callable[[Path, RunResult], None] = lambda folder, result: None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train, write the output folder and return what happened. `resume`: the folder of a run to resume.

    when_ready: called before anything is written, with what will be trained; may add to its settings.
    when_saved: called with the run's folder and what run.json will say, before run.json says `completed`.

    Raises FasttuneError for bad input, with nothing written. Once training has begun every ending is a RunResult and a
    run.json: completed, interrupted (SIGINT, SIGTERM, max_hours: state and adapter so far are saved) or failed. Until
    then run.json says `running`: a process that is killed leaves that, and `resume` does what is left.
    """
    started = time.perf_counter()
    if config.train.trackers:
        from fasttune.core import trackers

        trackers.check_installed(config.train.trackers)
    ranks.connect()
    resume = resume or run_folder.before_restart(config, ranks)
    folder = preflight(config, resume)
    with signals_to(at_once), library_log() as log, tempfile.TemporaryDirectory() as scratch, ExitStack() as locks:
        folder = Path(ranks.agree(str(folder)))
        there = resume is not None and ranks.agree(run_folder.is_run(folder))
        if resume:
            from fasttune.core import resume as resuming
        if there:
            if not ranks.rank:
                locks.enter_context(run_folder.hold(folder))  # before anything in it is looked at
            resuming.refuse_completed(folder)
        split_by = folder / checkpoint.FOLDER / checkpoint.START
        start = split_by if there and split_by.exists() else None
        job = prepare(config, folder, reporter, start, ranks)
        if not ranks.rank:
            when_ready(job)
        from fasttune.core import evaluation, model as models, trainer as trainers, what_ran  # torch is loaded

        identity, found = checkpoint.identity(job), None
        trained = what_ran.fingerprint(ranks.one_by_one(checkpoint.trained(job.model).values()))
        ranks.check_same({**identity, "start of what is trained": trained})
        if resume:
            found = resuming.find(folder, job.model, identity, reporter.note)
        initial = models.save_initial(job.model, job.config.lora, Path(scratch) / "initial")
        shown = hardware.line(job.machine), job.settings, job.total_steps, job.usd_per_hour
        reporter.start(job.config.name, *shown, ranks.size)
        before = evaluation.answer(job, job.problems, reporter.progress)
        trainer = trainers.build(job, Path(scratch), done=found.state["step"] if found else 0)
        if ranks.rank:  # keeps the same books, for nobody
            job.folder = Path(scratch) / "books"
            job.folder.mkdir()
            job.config = changed(job.config, train={"report_to": "none"})
        elif not there:
            job.folder, lock = run_folder.create(config, folder)
            locks.enter_context(lock)
        run_folder.begin(job, log, initial, resumed=there)

        journal = Journal(job, reporter, started)
        validator = evaluation.Validator(job, trainer.args.bf16)
        if found:
            from fasttune.core import restore

            journal.resume(found, folder)
            validator.restore(found.state)
            restore.into(trainer, found)
        keeper = checkpoint.Keeper(journal, trainer, validator, identity)
        hours = job.config.checkpoint.max_hours
        stops = Stops(ranks, ends_at=started + 3600 * hours if hours else math.inf)
        recorder = trainers.StepRecorder(trainer, journal, validator, keeper, stops)
        trainer.add_callback(recorder)
        report.write_json(job.folder / "run.json", what_ran.result_of(recorder))
        with signals_to(stops.signal):
            try:
                train(recorder)
                save(journal, initial)
                result = finish(recorder, before, when_saved)
            except KeyboardInterrupt:  # a second signal
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                journal.status, journal.error = "interrupted", Stopped.AT_ONCE
                result = finish(recorder, before, when_saved)
        with suppress(KeyboardInterrupt):
            journal.close()
            if ranks.rank and result.status == "failed":
                run_folder.keep_log(job.folder, folder, ranks.rank)
            ranks.agree(None)  # where one has ended, torchrun ends the others: not before rank 0 has written all
    return result


def train(recorder: "StepRecorder") -> None:
    """All optimizer steps that are left; writes down what ends them, unless it is a second signal."""
    from fasttune.core import what_ran

    job, journal, validator = recorder.job, recorder.journal, recorder.validator
    try:
        if journal.resumed_from_step is not None:
            validator.catch_up(journal.done, journal.steps)
        with journal:
            if journal.resumed_from_step is None and validator.due(0):
                validator.measure(0, journal.reporter.progress)
            journal.reporter.training()
            if journal.done < job.total_steps and not validator.ended_early:
                with what_ran.busy(job.machine) as busy:
                    recorder.trainer.train()
                recorder.stops.end_of_steps(busy())
            whole = recorder.stops.agree() is None and not validator.ended_early
            if whole and validator.missing(job.total_steps):  # ended by a signal, and resumed
                validator.measure(job.total_steps)
        journal.status = "completed"
    except Exception as error:  # every ending is reported in run.json
        journal.status, journal.error = "failed", job.ranks.part(_one_line(error, job))
        print(traceback.format_exc())  # into library.log
        return
    if recorder.stops.agree() is not None:
        journal.status, journal.error = "interrupted", recorder.stops.agreed
    if journal.done and not recorder.keeper.sound():
        journal.status = "failed"
        journal.error = f"the weights have diverged: start over with a lower train.learning_rate; {journal.kept}"
    elif journal.done:
        journal.saved_step = recorder.keeper.bring_back_best(journal.done)


def save(journal: Journal, initial_adapter: Path | None) -> None:
    """Write adapter/ or model/ of a run that made at least one good step; a full disk makes the run `failed`.

    Not after a second signal: it may have come in the middle of a step of the optimizer.
    """
    from safetensors import SafetensorError

    from fasttune.core import model as models

    job = journal.job
    if journal.saved_step is None or (job.ranks.rank and job.ranks.parts == 1):
        return
    full = job.config.train.method == "full"
    kind, dtype = ("model", job.plan.dtype) if full else ("adapter", None)
    try:
        with job.ranks.gathered(job.model, trained_only=not full):
            if job.ranks.rank:
                return
            models.save(job.model, job.tokenizer, job.folder / kind, initial_adapter, dtype)
        for name in run_folder.EVAL_FILES:  # scores of the weights that were there before
            (job.folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        journal.status, journal.error = "failed", f"{kind}/ could not be written: {why}; {journal.kept}"


def finish(recorder: "StepRecorder", before: list[str], when_saved: Callable[[Path, RunResult], None]) -> RunResult:
    """run.json and the report, before them the answers of a completed run. A full disk makes the run `failed`."""
    from fasttune.core import what_ran

    job, journal, samples, match = recorder.job, recorder.journal, list[Sample](), None
    path = job.folder / "run.json"
    journal.status = job.ranks.agree(journal.status)
    if job.ranks.rank:
        if journal.status == "completed":
            answer_again(recorder, before)
        return what_ran.result_of(recorder)
    speed = what_ran.achieved_tflops(job, journal.steps, MATMUL_SECONDS)
    try:
        if journal.status == "completed":  # said only when all of it is there: until then --resume does the rest
            report.write_json(path, what_ran.result_of(recorder, speed, status="running"))
            samples, match = answer_again(recorder, before)
        result = what_ran.result_of(recorder, speed, samples, match)
        report.write_html(job.folder / "report.html", result, journal.steps)
        when_saved(job.folder, result)
        report.write_json(path, result)
    except FasttuneError as error:
        told = f"{first_line(error)}; {journal.kept}"
        if journal.status == "completed":
            journal.status, journal.error = "failed", told
        else:
            journal.warnings.append(told)
        result = what_ran.result_of(recorder, speed, samples, match)
        with suppress(FasttuneError):
            report.write_json(path, result)
    if journal.status == "completed":
        last = job.folder / checkpoint.FOLDER / f"step-{journal.done}"
        checkpoint.remove(last)
        with suppress(OSError):  # other checkpoints are in it
            (last.parent / checkpoint.START).unlink(missing_ok=True)
            last.parent.rmdir()
    return result


def answer_again(recorder: "StepRecorder", before: list[str]) -> tuple[list[Sample], ExactMatch | None]:
    """The held-out problems after training; what goes wrong with them costs a warning and not the run."""
    from fasttune.core import evaluation

    job = recorder.job
    if not job.problems:
        return [], None
    try:
        if recorder.stops.agree() is None:
            with signals_to(at_once):
                after = evaluation.answer(job, job.problems, recorder.journal.reporter.progress)
                return evaluation.compare(job.config, job.problems, before, after)
        why = "a signal ended it"
    except KeyboardInterrupt:
        why = "a signal ended it"
    except Exception as error:
        print(traceback.format_exc())  # into library.log
        why = first_line(error)
    recorder.journal.warnings.append(f"the held-out problems were not answered after training: {why}")
    return [], None


def _one_line(error: Exception, job: Job) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        from fasttune.core import remedies

        ways = remedies.smaller(job.config, bool(job.machine.gpus))
        return f"out of memory with the fewest rows at once; try, in this order: {'; '.join(ways)}"
    return first_line(error) if isinstance(error, FasttuneError) else kind_and_line(error)
