"""Plain text files → chunks of documents, {"text": …}. What a document is, `data.documents` says: the whole file, a
line, or what stands between blank lines. Never more than one document and a block in memory.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune.data import files
from fasttune.data.files import BLOCK_BYTES
from fasttune.data.formats import Row
from fasttune.data.sources import Chunk, not_utf8
from fasttune.errors import DataError

MAX_BYTES = {"line": 64 << 20, "blank_line": 256 << 20, "file": 1 << 30}  # of a document: a larger one is none
ENDS = {"line": re.compile(rb"\r?\n"), "blank_line": re.compile(rb"\r?\n(?:[ \t\r]*\n)+"), "file": re.compile(rb"(?!)")}


BLANK = re.compile(rb"\A(?:[ \t\r]*\n)+|\r?(?:\n[ \t\r]*)+\Z|\r\Z")  # lines before a document and after it


def read(source: str, path: Path, documents: str | None) -> Iterator[Chunk]:
    """The documents of a file. Raises DataError."""
    if documents is None:
        raise DataError(
            f"data: {source} is plain text: say what a document of it is, data.documents=file, line or blank_line"
        )
    size, number = path.stat().st_size, 1
    with files.opened(source, path) as (raw, stream, _):
        for found in _split(source, stream, ENDS[documents], MAX_BYTES[documents]):
            if documents == "blank_line":  # of several, in two blocks, the last ones are left in front
                found = [text for each in found if (text := BLANK.sub(b"", each)).strip()]
            rows = [_row(source, at, text) for at, text in enumerate(found, number)]
            if rows:
                yield Chunk(source, number, min(1.0, raw.tell() / size), rows)
            number += len(rows)


def _split(source: str, stream: Any, end: "re.Pattern[bytes]", most: int) -> Iterator[list[bytes]]:
    """Whole documents, of about a block at a time."""
    rest = b""
    try:
        while block := stream.read(max(BLOCK_BYTES, len(rest))):  # twice as much each time: a long one is not slow
            rest += block
            *whole, rest = end.split(rest)
            if len(rest) > most:
                what = f"a document of over {most >> 20:,} MiB"
                raise DataError(f"data: {source} holds {what}: set data.documents to what its documents are")
            if whole:
                yield whole
    except OSError as error:
        raise DataError(f"data: {source} {files.damaged(error)}") from error
    if rest.strip():
        yield [rest]


def _row(source: str, number: int, text: bytes) -> Row | bytes:
    """A document; b"" for one with nothing in it, which Chunk.numbered skips."""
    if not text.strip():
        return b""
    try:
        return {"text": text.decode()}
    except UnicodeDecodeError as error:
        raise DataError(f"data: {source} document {number} is {not_utf8(error)}") from error
