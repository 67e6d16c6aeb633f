"""Where fasttune keeps what it makes once: $FASTTUNE_CACHE, or fasttune/ in the user's cache folder."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fasttune import paths


def root() -> Path:
    """The cache folder (not created here)."""
    if explicit := os.environ.get("FASTTUNE_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttune"


def folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`, built by `build(empty folder)` if it is not there yet.

    It appears under its name only when complete: built beside and renamed, so a killed build leaves nothing that is
    taken for whole, and of two processes that build it the first one wins.
    """
    target = root() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True
    ) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        build(made)
        paths.readable(made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # anything but "another process was first"
                raise
            shutil.rmtree(made)
    return target
