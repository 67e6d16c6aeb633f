"""What a person typed, and what is said back: names that no disk can have are refused, lines are kept short."""

import argparse
from pathlib import Path
from typing import NoReturn

LONGEST_LINE = 300  # characters of an error
LONGEST_NAME = 255  # bytes of one name in a path, on every usual file system
LONGEST_PATH = 4095  # bytes, Linux


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Only what a terminal prints, cut in the middle: the place is said first, the fix last."""
    line = "".join(c if c.isprintable() else " " for c in text)  # a file's name may steer a terminal
    half = longest // 2 - 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def writable(text: str) -> str:
    """The text itself. Raises ValueError where UTF-8 or a file name cannot hold it."""
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ValueError(f"holds the character U+{ord(character):04X}, which no name and no text can have")
    return text


def path(text: str) -> str:
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


class Parser(argparse.ArgumentParser):
    """A wrong option is one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{one_line(f'{self.prog}: {message}', LONGEST_LINE - 40)} (see {self.prog} --help)\n")
