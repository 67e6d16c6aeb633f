"""Where rows come from → chunks of rows: builtin:arithmetic, which is made here; files (files.py), on this machine or
behind a URL; hub data sets, owner/name or owner/name:subset (arrow.py).

Never more than one chunk in memory, except of a JSON array; every DataError names the file and the line.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fasttune.data import arithmetic
from fasttune.data.formats import Row
from fasttune.errors import DataError
from fasttune.settings import TOKENS

BUILTIN = "builtin:arithmetic"
BUILTIN_ROWS: dict[arithmetic.Part, int] = {"train": 2000, "test": 40}
CHUNK_ROWS = 1000
INT_DIGITS = 600  # Python reads no longer integers than a limit, which is nowhere below 640


@dataclass(frozen=True)
class Chunk:
    """Unparsed lines of JSONL, or rows. first: number of the first in its file, from 1. done: share of the source read
    then. before: how many are in the files before this one, of a folder.
    """

    source: str
    first: int
    done: float
    rows: list[Any]
    before: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, numbers: np.ndarray) -> "Chunk":
        """With nothing in place of the rows that have another number; `numbers`: ascending."""
        first = self.before + self.first
        start, end = numbers.searchsorted([first, first + len(self)])
        rows: list[Any] = [b""] * len(self)
        for at in (numbers[start:end] - first).tolist():
            rows[at] = self.rows[at]
        return replace(self, rows=rows)

    def numbered(self) -> Iterator[tuple[int, str, Row]]:
        """(number, place for an error, row) of each row; blank lines are skipped. Raises DataError."""
        for number, row in enumerate(self.rows, self.first):
            if isinstance(row, dict):
                yield self.before + number, f"{self.source} row {number}", row
            elif row.strip():
                place = f"{self.source} line {number}"
                yield self.before + number, place, parse(row, place)


def is_pattern(source: str) -> bool:
    """Whether it names files as a shell does: texts/*.txt, texts/**/*.jsonl."""
    return "://" not in source and glob.has_magic(source) and not os.path.exists(os.path.expanduser(source))


def check_source(source: str, split: str = "train") -> None:
    """Fail early, before anything heavy is imported: DataError if a file is missing or of an unknown kind."""
    if source == BUILTIN:
        return
    if source.startswith("builtin:"):
        raise DataError(f"data: {source} is unknown; the built-in data set is {BUILTIN}")
    from fasttune.data import files

    files.check(source, split)


def read(
    source: str,
    part: arithmetic.Part,
    split: str = "train",
    max_rows: int | None = None,
    streaming: bool = False,
    also: Collection[str] = (),
    documents: str | None = None,
) -> Iterator[Chunk]:
    """The rows of a source in its order, chunk by chunk. `part` is of a built-in set, `split` of a hub set, which
    `streaming` reads without downloading all of it first; `also`: columns to read beside those that formats.is_read;
    `documents`: what a row of a text is.
    """
    check_source(source, split)
    if source == BUILTIN:
        rows = arithmetic.generate(part, rows=max_rows or BUILTIN_ROWS[part])
        chunks = grouped(source, iter(rows), lambda read: read / len(rows))
    else:
        from fasttune.data import arrow, files

        paths = files.find(source, split)
        all_of_it = files.read_all(source, paths, also, documents) if paths else None
        chunks = all_of_it or arrow.hub(source, split, streaming, also)
    if max_rows is None:
        yield from chunks
        return
    for chunk in chunks:
        filled = [at for at, row in enumerate(chunk.rows) if isinstance(row, dict) or row.strip()][:max_rows]
        max_rows -= len(filled)
        if not max_rows:
            yield replace(chunk, rows=chunk.rows[: filled[-1] + 1])
            return
        yield chunk


def first_rows(
    source: str, part: arithmetic.Part, split: str, rows: int, *how: Any, **more: Any
) -> Iterator[tuple[int, str, Row]]:
    """The first rows of a source, as Chunk.numbered gives them; the others as `read` takes them."""
    for chunk in read(source, part, split, rows, *how, **more):
        yield from chunk.numbered()


def fingerprint(source: str, part: arithmetic.Part, split: str) -> str:
    """Hash of a source's content (of a file's bytes and kind, or of a hub data set's revision): a cache's key."""
    if source == BUILTIN:
        return hashlib.sha256(json.dumps(arithmetic.generate(part, rows=BUILTIN_ROWS[part])).encode()).hexdigest()
    from fasttune.data import arrow, files

    paths = files.find(source, split)
    if not paths:
        return f"{source} {split} {arrow.revision(source)}"
    whole = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.name} {digest}".encode())
    except OSError as error:
        raise DataError(f"data: {source} cannot be read: {error.strerror}") from error
    if len(paths) > 1:
        return whole.hexdigest()
    return f"{files.kind(source if '://' in source else paths[0].name)} {digest}"  # JSONL called .txt is other rows


def holds_text(source: str) -> bool:
    """Whether a source has plain text files, of which data.documents says what a document is."""
    from fasttune.data import files

    several = os.path.isdir(os.path.expanduser(source)) or is_pattern(source)
    names = [path.name for path in files.several(source)[0]] if several else [source]
    return any(files.kind(name) == "text" for name in names)


def check_asks(source: str, option: str) -> None:
    """Raise DataError for what holds text or tokens alone, where questions are wanted."""
    if source.endswith(TOKENS) or holds_text(source):
        what = "tokens" if source.endswith(TOKENS) else "plain text"
        raise DataError(
            f"{option}: {source} holds {what}, no questions: name rows with a question, e.g. JSONL; the loss on a text "
            "is measured by `fasttune train` (data.eval or data.eval_share)"
        )


def not_read(source: str) -> list[str]:
    """Names of what is left out of a folder, or of a pattern: files of an unknown kind, links to what is read."""
    if "://" in source or not (os.path.isdir(os.path.expanduser(source)) or is_pattern(source)):
        return []
    from fasttune.data import files, saved

    if saved.is_saved(Path(os.path.expanduser(source))):
        return []
    return [f"{path.name} (a link)" if path.is_symlink() else path.name for path in files.several(source)[1]]


def grouped(source: str, rows: Iterator[Row], done: Callable[[int], float]) -> Iterator[Chunk]:
    """Rows as chunks; `done(rows read)`: how much of the source that is, 0 to 1."""
    first = 1
    while group := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(source, first, done(first - 1 + len(group)), group)
        first += len(group)


def parse(text: bytes, place: str, kind: type = dict) -> Any:
    """What a JSON text holds. Raises DataError, also where that is no `kind`."""
    try:
        try:
            value = json.loads(text)
        except ValueError as error:
            if isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
                raise
            # an integer of thousands of digits, most likely in a column that is not used
            value = json.loads(text, parse_int=lambda digits: (int if len(digits) < INT_DIGITS else Decimal)(digits))
    except UnicodeDecodeError as error:
        raise DataError(f"data: {place} is {not_utf8(error)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "nested too deeply"
        raise DataError(f"data: {place} is no valid JSON: {what} (is the file cut off there?)") from error
    if not isinstance(value, kind):
        raise DataError(f"data: {place} is no JSON object, it is {type(value).__name__}: a row is {{…}}")
    return value


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}): convert it, e.g. iconv -f latin1 -t utf-8 OLD > NEW"
