"""Files and processes: what is written appears whole, nothing goes through a link, no pipe is waited for; the cache;
what libraries print goes to OUTPUT_DIR/library.log; child processes find no module in the current folder.

Only the standard library is imported here.
"""

import contextlib
import errno
import gc
import io
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, cast

from fasttune.errors import FasttuneError, first_line, one_line

LONGEST_NAME = 255  # bytes of one name in a path, on every usual file system
LONGEST_PATH = 4095  # bytes, Linux
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
OS_ERROR = re.compile(rf"\(os error ({'|'.join(map(str, FULL))})\)")  # as safetensors says it, with a class of its own
LEFTOVER_AGE_S = 24 * 3600
HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of this very package
WORKING = "fasttune torch triton transformers trl peft unsloth unsloth_zoo xformers flash-attn".split()

# --- names and files


def writable(text: str) -> str:
    """The text itself. Raises ValueError where UTF-8 or a file name cannot hold it."""
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ValueError(f"holds the character U+{ord(character):04X}, which no name and no text can have")
    return text


def path_text(text: str) -> str:
    """The text of a path or a hub id, as it was given. Raises ValueError where it can be neither."""
    if not text:
        raise ValueError("is empty: name a file or a folder")
    names = writable(text).encode().split(b"/")
    if max(map(len, names)) > LONGEST_NAME or len(text.encode()) > LONGEST_PATH:
        raise ValueError(f"{one_line(text, 100)!r} is too long: a name has at most {LONGEST_NAME} bytes")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text.split('/')[0]} is no user of this machine: write the whole path") from error
    return text


def read_text(path: Path, errors: str = "strict") -> str:
    """UTF-8. Raises OSError, also for what is no file: a read of a pipe may never end."""
    if not_a_file(path):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path.read_text(encoding="utf-8", errors=errors)


def not_a_file(path: Path) -> bool:
    """Whether a pipe, a device or a socket is there."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_atomic(path: Path, content: bytes) -> None:
    """The whole content or the old file, on the disk when this returns; a link is replaced. Raises OSError."""
    number, temporary = tempfile.mkstemp(".tmp", f".{path.name[:60]}.", path.parent)  # a new file, of a random name
    try:
        with open(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(number)
            os.fchmod(number, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def open_text(path: Path, mode: str) -> TextIO:
    """UTF-8, to write by the line. Raises OSError, also for a link, and for a pipe, which a write might wait for."""
    return cast(TextIO, open(path, mode, 1, "utf-8", "backslashreplace", opener=_no_link))


def _no_link(path: str, flags: int) -> int:
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        known = {errno.ELOOP: "it is a link, and nothing is written through one", errno.ENXIO: "it is a pipe"}
        raise OSError(error.errno, known.get(error.errno or 0, error.strerror), path) from None
    if not_a_file(Path(path)):
        os.close(number)
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", path)
    return number


def make_readable(folder: Path) -> None:
    """Everything in a new folder as readable as the umask says: libraries write weights for the owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# --- the cache: what is made once


def cache_root() -> Path:
    """$FASTTUNE_CACHE, or fasttune/ in the user's cache folder; not created here. Raises FasttuneError: no home."""
    try:
        if explicit := os.environ.get("FASTTUNE_CACHE"):
            return Path(explicit).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttune"
    except RuntimeError as error:
        raise FasttuneError(f"cache: {error} set FASTTUNE_CACHE to a folder you may write to") from error


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`, built by `build(empty folder)` if it is not there yet.

    It appears under its name only when complete: built beside and renamed, so a killed build leaves nothing that is
    taken for whole, and of two processes that build it, on one node or two, the first one wins. Raises FasttuneError
    where the cache cannot be written.
    """
    target = cache_root() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _cache_not_written(error.strerror) from error
    with scratch:
        made = Path(scratch.name) / "made"
        made.mkdir()
        try:
            build(made)
            make_readable(made)
        except Exception as error:
            if (isinstance(error, OSError) and error.errno in FULL) or OS_ERROR.search(str(error)):
                raise _cache_not_written(first_line(error)) from error
            raise
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # anything but "another process was first"
                raise
            shutil.rmtree(made)
    return target


def discard_cached(target: Path, is_whole: Callable[[Path], bool]) -> None:
    """Remove a damaged entry. What another process has put there since, and may be reading, stays."""
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        target.rename(aside)
    except FileNotFoundError:  # another process was first
        return
    except OSError as error:
        raise _cache_not_written(error.strerror) from error
    if is_whole(aside):
        with contextlib.suppress(OSError):  # a third process has made one
            aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(parent: Path) -> None:
    """What a killed build has left: for a day nothing was written into it, by this node or another."""
    for left in parent.glob(".*-*"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > LEFTOVER_AGE_S:
                shutil.rmtree(left)


def _cache_not_written(why: str | None) -> FasttuneError:
    fix = "free some room there, or set FASTTUNE_CACHE to another folder"
    return FasttuneError(f"cache: {cache_root()} cannot be written ({why}); {fix}")


# --- what libraries print


class LibraryLog(io.TextIOBase):
    """A text stream that is kept in memory until the output folder exists."""

    def __init__(self) -> None:
        self.sink: TextIO = io.StringIO()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk must not end a run for what libraries print
            self.sink.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.sink.flush()

    def move_to(self, path: Path, append: bool = False) -> None:
        """Write what came so far into `path`, and everything that comes from now on."""
        assert isinstance(self.sink, io.StringIO)
        so_far = self.sink.getvalue()
        self.sink = open_text(path, "a" if append else "w")
        self.write(so_far)


@contextlib.contextmanager
def library_log() -> Iterator[LibraryLog]:
    """Catch stdout, log records and Python warnings while it is open; stderr stays the person's."""
    log = LibraryLog()
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        with contextlib.redirect_stdout(log):
            yield log
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            log.sink.close()


def take_over_loggers() -> None:
    """Libraries attach their own stderr handlers at import; send their records to the root logger instead."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            console = [h for h in logger.handlers if type(h) is logging.StreamHandler]
            for handler in console:
                logger.removeHandler(handler)
                logger.propagate = True


@contextlib.contextmanager
def native_stderr_closed() -> Iterator[None]:
    """Drop what C++ code writes to file descriptor 2 in here; keep it short, Python's stderr is silent too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """For imports: half a million objects that stay, and Python would look through all of them, again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


# --- processes: a stranger's folder may hold a torch.py, and Python puts the current folder first on its path


def leave_current_folder() -> None:
    """Every command, before it imports anything of others: also for processes that libraries start (spawn)."""
    sys.path[:] = child_path()
    os.environ["PYTHONSAFEPATH"] = "1"


def child_path() -> list[str]:
    """sys.path without the current folder, with the one that holds this package."""
    here = os.stat(".")
    kept = [place for place in sys.path if place == HOME or (place and not _is_folder(place, here))]
    return kept if HOME in kept else [*kept, HOME]


def _is_folder(place: str, folder: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(place), folder)
    except OSError:
        return False  # a zip of modules that is not there


def versions() -> dict[str, str]:
    """Versions of the packages that do the work, as pip calls them, where they are installed: for a result."""
    import importlib.metadata  # twenty milliseconds that --help can do without

    found = {}
    for package in WORKING:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
