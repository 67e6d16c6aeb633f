"""Where fasttune keeps what it makes once: $FASTTUNE_CACHE, or fasttune/ in the user's cache folder."""

import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fasttune import paths
from fasttune.errors import FasttuneError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
OS_ERROR = re.compile(rf"\(os error ({'|'.join(map(str, FULL))})\)")  # as safetensors says it, with a class of its own
LEFT_S = 24 * 3600


def root() -> Path:
    """The cache folder (not created here). Raises FasttuneError where there is no home folder."""
    try:
        if explicit := os.environ.get("FASTTUNE_CACHE"):
            return Path(explicit).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttune"
    except RuntimeError as error:
        raise FasttuneError(f"cache: {error} set FASTTUNE_CACHE to a folder you may write to") from error


def folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`, built by `build(empty folder)` if it is not there yet.

    It appears under its name only when complete: built beside and renamed, so a killed build leaves nothing that is
    taken for whole, and of two processes that build it, on one node or two, the first one wins. Raises FasttuneError
    where the cache cannot be written.
    """
    target = root() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _not_written(error.strerror) from error
    with scratch:
        made = Path(scratch.name) / "made"
        made.mkdir()
        try:
            build(made)
            paths.readable(made)
        except Exception as error:
            if (isinstance(error, OSError) and error.errno in FULL) or OS_ERROR.search(str(error)):
                raise _not_written(first_line(error)) from error
            raise
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # anything but "another process was first"
                raise
            shutil.rmtree(made)
    return target


def discard(target: Path, is_whole: Callable[[Path], bool]) -> None:
    """Remove a damaged entry. What another process has put there since, and may be reading, stays."""
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        target.rename(aside)
    except FileNotFoundError:  # another process was first
        return
    except OSError as error:
        raise _not_written(error.strerror) from error
    if is_whole(aside):
        with suppress(OSError):  # a third process has made one
            aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what a killed build has left: for a day nothing was written into it, by this node or another."""
    for left in parent.glob(".*-*"):
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > LEFT_S:
                shutil.rmtree(left)


def _not_written(why: str | None) -> FasttuneError:
    return FasttuneError(
        f"cache: {root()} cannot be written ({why}); free some room there, or set FASTTUNE_CACHE to another folder"
    )
