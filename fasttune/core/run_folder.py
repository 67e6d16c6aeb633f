"""The folder of a run: its name, whether it may be used, its lock; and what is written there while the run trains:
config.yaml, and metrics.jsonl step by step.
"""

import fcntl
import os
import platform
import re
import shlex
import shutil
import time
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fasttune import config as configuration, hardware, report, system
from fasttune.config import TRUST, Config
from fasttune.core import checkpoint
from fasttune.core.ranks import Ranks
from fasttune.data.sources import is_pattern
from fasttune.errors import OutputError, in_one_line
from fasttune.metrics import Status, StepMetrics
from fasttune.system import LibraryLog
from fasttune.terminal import Reporter

if TYPE_CHECKING:
    from fasttune.core.prepare import Job
    from fasttune.core.resume import Checkpoint
    from fasttune.core.trackers import Tracker

CONFIG, METRICS, LOG, REFACTORED = "config.yaml", "metrics.jsonl", "library.log", "refactor.jsonl"
RUN_FILES = (CONFIG, METRICS, REFACTORED, "run.json", "report.html", LOG, "adapter", "model", checkpoint.FOLDER)
RANK_LOG = "rank-{}.log"  # of a rank that failed, beside that of rank 0
EVAL_FILES = ("eval.json", "eval_samples.jsonl")
TRACKERS = ("tensorboard", "wandb")  # folders of train.report_to
LOCK = ".lock"
WRITTEN = (*RUN_FILES, *EVAL_FILES, *TRACKERS, LOCK)
LEFTOVERS = (".adapter-*", ".model-*", ".run.json.*", ".report.html.*", ".config.yaml.*", ".metrics.jsonl*")
MARK = "# Resolved by fasttune"  # how the config.yaml of a run begins
SLACK_GIB = 0.1  # metrics, report, tokenizer


def choose(config: Config, resume: Path | None = None) -> Path:
    """The folder this run will write, checked but not created; `resume` is one to resume in. Raises OutputError."""
    dated = f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = resume or Path(config.output_dir or dated).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir: {folder} is a file; name a folder")
    if linked := [name for name in WRITTEN if (folder / name).is_symlink()]:
        raise OutputError(f"output_dir: {folder / linked[0]} is a link, and nothing is written through one; remove it")
    if resume or config.output_dir:
        _check_free(folder, config.overwrite or resume is not None)
    parent = hardware.nearest_existing(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output_dir: {parent} is not writable; name a folder you may write to")
    check_space(folder, 0)
    return folder


def is_run(folder: Path) -> bool:
    """Whether a run of fasttune has written into it: only then anything in it may be replaced."""
    path = folder / CONFIG
    try:
        return path.is_file() and path.read_bytes().startswith(MARK.encode())
    except OSError:
        return False


def before_restart(config: Config, ranks: Ranks) -> Path | None:
    """The run that the processes before these trained, where torchrun has started them again. Raises OutputError."""
    if ranks.most_restarts and not config.output_dir:
        raise OutputError("output_dir: torchrun may restart this run, which is then looked for there: set it")
    folder = Path(config.output_dir or "").expanduser()
    return folder if ranks.restarts and is_run(folder) else None


def _check_free(folder: Path, replace: bool) -> None:
    """Raise OutputError where a run would write over one that is not to be replaced, or over files of others."""
    if is_run(folder):
        if not replace:
            raise OutputError(
                f"output_dir: {folder} already holds a run; name another, resume it (--resume), or set "
                "overwrite=true to replace it"
            )
        return
    for name in RUN_FILES:
        if os.path.lexists(folder / name):
            raise OutputError(f"output_dir: {folder} holds {name}, which no run of fasttune wrote; name another folder")


def resume_command(job: "Job") -> str:
    """What a person types to resume a run."""
    command = ["fasttune", "train", str(job.folder / CONFIG), "--resume", str(job.folder)]
    command += ["--gpus", str(job.ranks.size)] if 1 < job.ranks.size == job.ranks.local_size else []
    return shlex.join([*command, *([f"{TRUST}=true"] if job.config.model.trust_remote_code else [])])


def check_space(folder: Path, weights_gib: float, what: str = "output_dir") -> None:
    """Raise OutputError unless the disk can hold the weights to be saved. `what`: the setting that names the folder."""
    needed_gib, free_gib = weights_gib + SLACK_GIB, hardware.disk_free_gib(folder)
    if free_gib < needed_gib:
        raise OutputError(
            f"{what}: the disk of {folder} has {free_gib:.2f} GiB free, {needed_gib:.2f} GiB are needed; "
            "free some, or name a folder on another disk"
        )


def create(config: Config, folder: Path) -> tuple[Path, IO[str]]:
    """The folder of a new run, held (see `hold`); with `overwrite` what an old run wrote there is removed.

    Where fasttune chose the name, and another run that began in the same second has it, NAME-2.
    """
    number, chosen = 1, folder
    with _explained(folder, "made"):
        while config.output_dir is None:
            try:
                chosen.mkdir(parents=True)  # only one process can make it, on a disk that several nodes share too
                break
            except FileExistsError:
                number += 1
                chosen = folder.with_name(f"{folder.name}-{number}")
        lock = hold(chosen)
        try:
            _check_free(chosen, config.overwrite)  # again: another run may have been there since
            if is_run(chosen):
                _remove_old(chosen)
        except (OSError, OutputError):
            lock.close()
            raise
    return chosen, lock


def _remove_old(folder: Path) -> None:
    """What a run wrote. Its config.yaml, which shows that it was one, stays until the new one takes its place."""
    settings = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    asked = re.search(r"report_to:((?: \S+)|(?:\s+- \S+)+)", settings)  # one, or a list
    trackers = [name for name in TRACKERS if asked and name in asked[1].split()]
    for name in {*RUN_FILES, *EVAL_FILES, *trackers} - {CONFIG, checkpoint.FOLDER}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for path in folder.glob(RANK_LOG.format("*")):
        path.unlink()
    for _, path in checkpoint.steps(folder):
        checkpoint.remove(path)
    (folder / checkpoint.FOLDER / checkpoint.START).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left. Only under the lock of a run."""
    checkpoint.sweep(folder)
    for path in [path for pattern in LEFTOVERS for path in folder.glob(pattern)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def hold(folder: Path) -> IO[str]:
    """Make the folder and hold it for this process. Returns the open lock: it is free when the process is gone."""
    with _explained(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = system.open_text(folder / LOCK, "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise OutputError(
                f"output_dir: {folder} is in use by process {holder}; wait for it, or name another folder"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} of {platform.node()}\n")
        lock.flush()
    return lock


def _explained(folder: Path, done: str) -> AbstractContextManager[None]:
    """An OSError in it becomes an OutputError: the folder cannot be made, or written."""
    return in_one_line(
        OutputError, f"output_dir: {folder} cannot be {done}", "free some space, or name another folder", (OSError,)
    )


def begin(job: "Job", log: LibraryLog, start: Path | None, resumed: bool) -> None:
    """Write the resolved config into the folder of a run, which is held. Raises OutputError.

    start: the folder of the adapter that a run splits its base weights by, and splits them by again when it is resumed.
    """
    with _explained(job.folder, "written"):
        _write_config(job)
        sweep(job.folder)
        log.move_to(job.folder / LOG, append=resumed)
        if start is not None and not (job.folder / checkpoint.FOLDER / checkpoint.START).exists():
            checkpoint.keep_start(job.folder, start / "adapter_model.safetensors")


def keep_log(books: Path, folder: Path, rank: int) -> None:
    """Beside the log of rank 0 that of another one, whose own folder goes with it: its traceback is there."""
    with suppress(OSError):
        shutil.copyfile(books / LOG, folder / RANK_LOG.format(rank))


def _write_config(job: "Job") -> None:
    header = f"{MARK}; run it again with: fasttune train config.yaml\n"
    text = configuration.dump(_portable(job.config), header)
    system.write_atomic(job.folder / CONFIG, text.encode())


def _portable(config: Config) -> Config:
    """As config.yaml keeps it: local paths absolute, and no output folder, so that it can be run again as it is."""

    def absolute(name: str | None) -> str | None:
        path = Path(name).expanduser() if name and not name.startswith("builtin:") else None
        if path and is_pattern(str(name)):
            return str(Path.cwd() / path)
        return str(path.resolve()) if path and path.exists() else name

    train = config.data.train
    named = absolute(train) if isinstance(train, str) else {absolute(name): weight for name, weight in train.items()}
    return configuration.changed(
        config,
        data={name: absolute(getattr(config.data, name)) for name in ("eval", "affixes")} | {"train": named},
        model={"name": absolute(config.model.name)},
        output_dir=None,
        overwrite=False,
    )


class Journal:
    """What a run has done so far, and how it ended. Told of every step and warning: keeps, shows and writes them."""

    def __init__(self, job: "Job", reporter: Reporter, started: float):
        self.job, self.reporter = job, reporter
        self.started = started  # perf_counter() of this process
        self.status: Status = "running"
        self.error: str | None = None
        self.warnings = list(job.warnings)
        self.steps: list[StepMetrics] = []
        self.resumed_from_step: int | None = None
        self.earlier_s = 0.0  # what the run had taken up to the checkpoint it resumes from
        self.checkpoint: Path | None = None  # the last good one
        self.saved_step: int | None = None  # whose weights are saved
        self._path = job.folder / METRICS
        self._disk_is_full = False
        self._trackers: list[Tracker] = []

    def resume(self, found: "Checkpoint", folder: Path) -> None:
        """Go back to a checkpoint of the run in `folder`, with the steps that lie before it."""
        self.checkpoint, self.earlier_s = found.path, found.state["wall_s"]
        self.resumed_from_step = found.state["step"]
        from fasttune.core import resume

        self.steps = resume.read_metrics(folder, found.state["step"], self.warnings.append)
        resume.cut_off(self.job.folder / REFACTORED, found.state["step"])

    @property
    def done(self) -> int:
        """Steps that are behind the run."""
        return self.steps[-1].step if self.steps else self.resumed_from_step or 0

    @property
    def wall_s(self) -> float:
        """Seconds of the whole run up to now, with what it had taken before it was resumed."""
        return self.earlier_s + time.perf_counter() - self.started

    @property
    def kept(self) -> str:
        """What is left to resume from, for a message."""
        return f"{self.checkpoint.name} is the last good checkpoint" if self.checkpoint else "there is no checkpoint"

    def __enter__(self) -> "Journal":
        for text in self.warnings:
            self.reporter.warn(text)
        for name in self.job.config.train.trackers:
            from fasttune.core import trackers

            self._trackers.append(trackers.Tracker(name, self.job, self.resumed_from_step, self.warn))
        self._write_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.reporter.stop()
        with suppress(OSError):
            if self._disk_is_full or not self._path.exists():
                self._write_all()

    def close(self) -> None:
        """Last, after all is saved: a service that hangs must not hold that up."""
        for tracker in self._trackers:
            tracker.close()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.reporter.warn(text)

    def step(self, step: StepMetrics) -> None:
        self.steps.append(step)
        self._write(step)
        for tracker in self._trackers:
            tracker.step(step)
        self.reporter.step(step)

    def refactored(self, step: int, layers: list[dict[str, Any]]) -> None:
        """A line a layer in refactor.jsonl; one that cannot be written costs a warning."""
        try:
            with system.open_text(self.job.folder / REFACTORED, "a") as file:
                file.writelines(report.to_json_line({"step": step, **layer}) + "\n" for layer in layers)
        except OSError as error:
            self.warn(f"step {step}: {REFACTORED} could not be written ({error.strerror})")

    def _write(self, step: StepMetrics) -> None:
        """Its line. On a full disk the run continues, and the file is written again as soon as there is room."""
        try:
            if self._disk_is_full or not self._path.exists():
                self._write_all()
            else:
                with system.open_text(self._path, "a") as file:
                    file.write(_line(step))
            self._disk_is_full = False
        except OSError as error:
            if not self._disk_is_full:
                self.warn(
                    f"step {step.step}: {METRICS} could not be written ({error.strerror}); written later, if it can"
                )
            self._disk_is_full = True

    def _write_all(self) -> None:
        """A file with all steps so far, the old one until it is whole; its folder again, where somebody removed it."""
        folder = self.job.folder
        if not (folder / CONFIG).exists():
            folder.mkdir(parents=True, exist_ok=True)  # a checkpoint may have made it already
            _write_config(self.job)
            self.warn(f"{folder} was removed while the run wrote into it: made again")
        system.write_atomic(self._path, "".join(map(_line, self.steps)).encode())


def _line(step: StepMetrics) -> str:
    return report.to_json_line(step) + "\n"
