"""What libraries print and log during a run goes to OUTPUT_DIR/library.log, not across the progress bar."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fasttune import paths


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
        self.sink = paths.open_text(path, "a" if append else "w")
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
