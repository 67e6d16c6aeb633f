"""The folder of a run: its name, whether it may be used, and whether the disk can take what will be written."""

import os
import shutil
from datetime import datetime
from pathlib import Path

from fasttune.config import Config
from fasttune.errors import OutputError

RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl", "adapter", "model")
SLACK_GIB = 0.1  # metrics, report, tokenizer


def choose(config: Config) -> Path:
    """The folder this run will write, checked but not created. Raises OutputError."""
    folder = Path(config.output_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}").expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir: {folder} is a file; name a folder")
    if folder.is_dir() and any((folder / name).exists() for name in RUN_FILES) and not config.overwrite:
        raise OutputError(
            f"output_dir: {folder} already holds a run; name another, or set overwrite=true to replace it"
        )
    parent = _nearest_existing(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output_dir: {parent} is not writable; name a folder you may write to")
    check_space(folder, 0)
    return folder


def check_space(folder: Path, weights_gib: float) -> None:
    """Raise OutputError unless the disk can hold the weights to be saved."""
    needed_gib = weights_gib + SLACK_GIB
    free_gib = shutil.disk_usage(_nearest_existing(folder)).free / 2**30
    if free_gib < needed_gib:
        raise OutputError(
            f"output_dir: the disk of {folder} has {free_gib:.2f} GiB free, this run needs {needed_gib:.2f} GiB; "
            "free some, or name a folder on another disk"
        )


def create(folder: Path) -> None:
    """Make the folder; an old run's files in it are removed (`choose` has checked that this is wanted)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*RUN_FILES, "report.html", "library.log"):
            old = folder / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"output_dir: {folder} cannot be made ({error.strerror}); name another folder") from error


def _nearest_existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
