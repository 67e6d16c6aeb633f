"""The folder of a run: its name, whether it may be used, and whether the disk can take what will be written."""

import fcntl
import json
import os
import platform
import re
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from fasttune import hardware, system
from fasttune.config import Config
from fasttune.core import checkpoint
from fasttune.errors import OutputError

RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl", "adapter", "model", "checkpoints")
EVAL_FILES = ("eval.json", "eval_samples.jsonl")
TRACKERS = ("tensorboard", "wandb")  # folders of train.report_to
LEFTOVERS = (".adapter-*", ".model-*", ".run.json.*", ".report.html.*", ".config.yaml.*", ".metrics.jsonl*")
MARK = "# Resolved by fasttune"  # how the config.yaml of a run begins
LOCK = ".lock"
WRITTEN = (*RUN_FILES, *EVAL_FILES, LOCK, "library.log", "report.html", "tensorboard", "wandb")
SLACK_GIB = 0.1  # metrics, report, tokenizer


def choose(config: Config, resume: Path | None = None) -> Path:
    """The folder this run will write, checked but not created; `resume` is one to go on in. Raises OutputError."""
    folder = resume or Path(config.output_dir or _dated(config)).expanduser()
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


def _dated(config: Config) -> str:
    return f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def is_run(folder: Path) -> bool:
    """Whether a run of fasttune has written into it: only then anything in it may be replaced."""
    path = folder / "config.yaml"
    try:
        return path.is_file() and path.read_bytes().startswith(MARK.encode())
    except OSError:
        return False


def _check_free(folder: Path, replace: bool) -> None:
    """Raise OutputError where a run would write over one that is not to be replaced, or over files of others."""
    if is_run(folder):
        if not replace:
            raise OutputError(
                f"output_dir: {folder} already holds a run; name another, go on with it (--resume), or set "
                "overwrite=true to replace it"
            )
        return
    for name in (*RUN_FILES, "library.log", "report.html"):
        if os.path.lexists(folder / name):
            raise OutputError(f"output_dir: {folder} holds {name}, which no run of fasttune wrote; name another folder")


def refuse_completed(run: Path) -> None:
    """Raise OutputError if nothing of a run is left to do. Under its lock: it may be completed any moment."""
    path = run / "run.json"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "completed":
            raise OutputError(f"--resume: {run} is completed, nothing is left to do; begin anew in another output_dir")


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
    dated = re.compile(re.escape(config.name) + r"-(\d{8}-\d{6})(?:-(\d+))?")  # not those of another name: NAME-B-DATE
    found = [(dated.fullmatch(path.name), path) for path in Path("runs").glob("*/") if (path / "checkpoints").is_dir()]
    runs = sorted((match[1], int(match[2] or 1), path) for match, path in found if match)
    if not runs:
        raise OutputError(f"--resume: no runs/{config.name}-DATE has a checkpoint; name the folder of the run")
    if len(runs) > 1 and runs[-1][0] > f"{datetime.now():%Y%m%d-%H%M%S}":
        raise OutputError(
            f"--resume: {runs[-1][2]} is dated in the future, so it is not known which run is the newest: "
            "name its folder, and rename the one with the wrong date"
        )
    return runs[-1][2]


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
    while config.output_dir is None:
        try:
            chosen.mkdir(parents=True)  # only one process can make it, on a disk that several nodes share too
            break
        except FileExistsError:
            number += 1
            chosen = folder.with_name(f"{folder.name}-{number}")
        except OSError as error:
            raise _not_made(chosen, error) from error
    lock = hold(chosen)
    try:
        _check_free(chosen, config.overwrite)  # again: another run may have been there since
        if is_run(chosen):
            _remove_old(chosen)
    except OSError as error:
        lock.close()
        raise _not_made(chosen, error) from error
    except OutputError:
        lock.close()
        raise
    return chosen, lock


def _remove_old(folder: Path) -> None:
    """What a run wrote. Its config.yaml, which shows that it was one, stays until the new one takes its place."""
    said = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    trackers = [name for name in TRACKERS if f"report_to: {name}" in said]
    for name in ("run.json", "metrics.jsonl", "adapter", "model", "library.log", "report.html", *EVAL_FILES, *trackers):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for _, path in checkpoint.steps(folder):
        checkpoint.remove(path)
    (folder / checkpoint.FOLDER / checkpoint.START).unlink(missing_ok=True)


def keep_start(folder: Path, adapter: Path) -> None:
    """As checkpoint.keep_start. Raises OutputError."""
    try:
        checkpoint.keep_start(folder, adapter / "adapter_model.safetensors")
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder / checkpoint.FOLDER} cannot be written ({error.strerror or error}); free some space"
        ) from error


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left. Only under the lock of a run."""
    checkpoint.sweep(folder)
    for path in [path for pattern in LEFTOVERS for path in folder.glob(pattern)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def hold(folder: Path) -> IO[str]:
    """Make the folder and hold it for this process. Returns the open lock: it is free when the process is gone."""
    try:
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
    except OSError as error:
        raise _not_made(folder, error) from error
    return lock


def _not_made(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"output_dir: {folder} cannot be made ({error.strerror}); name another folder")
