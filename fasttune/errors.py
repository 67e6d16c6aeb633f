"""Every error a person can cause, and how it leaves the program; an error of others in one line.

FasttuneError          one line on stderr: what, where, how to fix it; exit 2
├── ConfigError        the config file or a key=value: all problems at once, one line each
├── DataError          a data set that is missing, empty or of an unknown form
├── ModelError         a model that is missing or cannot be loaded
│   └── HubError       the hub cannot be reached, or does not give it to this person
├── OutputError        an output folder that is taken, read-only or on a full disk
└── RunFailed          the run itself failed (not the user's input); exit 1
"""

import argparse
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

LONGEST_LINE = 300  # characters of an error

_beginning = reprlib.Repr()
_beginning.maxstring = _beginning.maxother = 60


class FasttuneError(Exception):
    """A problem that the person at the keyboard can fix; the message says how."""

    exit_code = 2


class ConfigError(FasttuneError):
    """Problems of one config, all of them: one line each, `key: what (how to fix it)`."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(FasttuneError):
    """The data set cannot be read or holds nothing to train on."""


class ModelError(FasttuneError):
    """The model cannot be found, reached or loaded."""


class HubError(ModelError):
    """The hub cannot be reached, or does not give this person the model: it may be known from elsewhere."""


class OutputError(FasttuneError):
    """The output folder cannot take this run."""


class RunFailed(FasttuneError):
    """The run started and could not be finished."""

    exit_code = 1


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Only what a terminal prints, cut in the middle: the place is said first, the fix last."""
    line = "".join(c if c.isprintable() else " " for c in text)  # a file's name may steer a terminal
    half = longest // 2 - 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or the name of its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def kind_and_line(error: BaseException) -> str:
    """An error of somebody else's code in one line: `ValueError: …`."""
    return f"{type(error).__name__}: {first_line(error)}"


def last_line(text: str, otherwise: str) -> str:
    """The last line of what a program printed that says something: where a traceback has its error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), otherwise)


def short(value: object) -> str:
    """The kind of a value and its beginning, however long it is and however deeply nested."""
    shown = _beginning.repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + '…'}"


@contextmanager
def in_one_line(
    kind: type[FasttuneError], what: str, fix: str, caught: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """What somebody else's code raises, of the kinds `caught`, becomes `what (its own words); fix`."""
    try:
        yield
    except FasttuneError:
        raise
    except caught as error:
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise kind(f"{what} ({' '.join(said.split())[:170]}); {fix}") from error


class Parser(argparse.ArgumentParser):
    """A wrong option is one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{one_line(f'{self.prog}: {message}', LONGEST_LINE - 40)} (see {self.prog} --help)\n")
