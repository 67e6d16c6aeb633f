"""The folder of a run: its name, whether it may be used, and whether the disk can take what will be written."""

import fcntl
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import IO

from fasttune import hardware, paths
from fasttune.config import Config
from fasttune.errors import OutputError

RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl", "adapter", "model", "checkpoints")
EVAL_FILES = ("eval.json", "eval_samples.jsonl")
LOCK = ".lock"
WRITTEN = (*RUN_FILES, *EVAL_FILES, LOCK, "library.log", "report.html", "tensorboard", "wandb")
SLACK_GIB = 0.1  # metrics, report, tokenizer


def choose(config: Config, resume: Path | None = None) -> Path:
    """The folder this run will write, checked but not created; `resume` is one to go on in. Raises OutputError."""
    named = config.output_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = resume or Path(named).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir: {folder} is a file; name a folder")
    if linked := [name for name in WRITTEN if (folder / name).is_symlink()]:
        raise OutputError(f"output_dir: {folder / linked[0]} is a link, and nothing is written through one; remove it")
    holds_a_run = folder.is_dir() and any((folder / name).exists() for name in RUN_FILES)
    if holds_a_run and not config.overwrite and resume is None:
        raise OutputError(
            f"output_dir: {folder} already holds a run; name another, go on with it (--resume), or set overwrite=true "
            "to replace it"
        )
    parent = hardware.nearest_existing(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output_dir: {parent} is not writable; name a folder you may write to")
    check_space(folder, 0)
    return folder


def to_resume(config: Config, named: str) -> Path:
    """The folder of the run that --resume means: `named`, else the config's, else the newest of this name in runs/.

    Raises OutputError.
    """
    own = Path(config.output_dir).expanduser() if config.output_dir else None
    if named:
        folder = Path(named).expanduser()
        if own is not None and own.absolute() != folder.absolute():
            raise OutputError(f"--resume {named}: the run goes on in its own folder; leave output_dir={own} out")
        if not folder.is_dir():
            raise OutputError(f"--resume {named}: no such folder; name that of the run to go on with")
        return folder
    if own is not None:
        return own
    runs = sorted(path for path in Path("runs").glob(f"{config.name}-*") if (path / "checkpoints").is_dir())
    if not runs:
        raise OutputError(f"--resume: no runs/{config.name}-* has a checkpoint; name the folder of the run")
    return runs[-1]


def check_space(folder: Path, weights_gib: float, what: str = "output_dir") -> None:
    """Raise OutputError unless the disk can hold the weights to be saved. `what`: the setting that names the folder."""
    needed_gib, free_gib = weights_gib + SLACK_GIB, hardware.disk_free_gib(folder)
    if free_gib < needed_gib:
        raise OutputError(
            f"{what}: the disk of {folder} has {free_gib:.2f} GiB free, {needed_gib:.2f} GiB are needed; "
            "free some, or name a folder on another disk"
        )


def create(folder: Path, resume: bool = False) -> IO[str]:
    """Make the folder and hold it for this process; an old run's files in it are removed (`choose` has checked that).

    With `resume` what a run needs to go on stays. Returns the open lock: the folder is free when the process is gone.
    """
    old = ["run.json", "adapter", "model"] if resume else [*RUN_FILES, "library.log", "tensorboard", "wandb"]
    old += ["report.html", *EVAL_FILES]  # scores are those of the weights that go
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = paths.open_text(folder / LOCK, "a+")
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
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        for name in old:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"output_dir: {folder} cannot be made ({error.strerror}); name another folder") from error
    return lock
