"""Rows of a file, chunk by chunk: JSONL, JSON and CSV (each plain, .gz or .zst) and Parquet.

Never more than one chunk in memory, except of a JSON array; every DataError names the file and the line.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fasttune.data import beside, formats
from fasttune.data.formats import Row
from fasttune.errors import DataError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BOM = codecs.BOM_UTF8
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of what is called CSV and is not separated by commas
COMMAS = "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={!r}))"
INT_DIGITS = 600  # Python reads no longer integers than a limit, which is nowhere below 640
BLOCK_BYTES = 1 << 20  # of a JSONL file read at once
MAX_LINE_BYTES = 64 << 20
CHUNK_ROWS = 1000


@dataclass(frozen=True)
class Chunk:
    """Some rows on their way to a worker: unparsed JSONL lines, or rows.

    first: line (JSONL) or row number of the first one, from 1. done: how much of the source is read by its end, 0 to 1.
    """

    source: str
    first: int
    done: float
    lines: list[bytes] | None = None
    rows: list[Row] | None = None

    def __len__(self) -> int:
        return len(self.lines if self.lines is not None else self.rows or [])

    def numbered(self) -> Iterator[tuple[int, str, Row]]:
        """(number, place for an error, row) of each row; blank lines are passed over. Raises DataError."""
        if self.rows is not None:
            for number, row in enumerate(self.rows, self.first):
                yield number, f"{self.source} row {number}", row
            return
        for number, line in enumerate(self.lines or [], self.first):
            if line.strip():
                place = f"{self.source} line {number}"
                yield number, place, _parse(line, place)


def read(source: str, path: Path, also: Collection[str] = ()) -> Iterator[Chunk]:
    """All rows of a file whose `kind` is known. Of Parquet only the columns that mean something (formats.is_read), and
    `also`, are read. Raises DataError.
    """
    try:
        if kind(path) == "parquet":
            yield from _parquet(source, path, also)
        else:
            yield from {"jsonl": _jsonl, "json": _json, "csv": _csv}[kind(path) or ""](source, path)
    except OSError as error:
        what = f"cannot be read: {error.strerror}" if error.strerror else _damaged(error)  # pyarrow's has no strerror
        raise DataError(f"data: {source} {what}") from error


def kind(path: Path) -> str | None:
    """jsonl, json, csv or parquet; None for any other ending. Parquet compresses by itself."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return None if kind == "parquet" else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


def grouped(source: str, rows: Iterator[Row], done: Callable[[int], float]) -> Iterator[Chunk]:
    """Rows as chunks; `done(rows read)`: how much of the source that is, 0 to 1."""
    first, group = 1, []
    for row in rows:
        group.append(row)
        if len(group) == CHUNK_ROWS:
            yield Chunk(source, first, done(first - 1 + len(group)), rows=group)
            first, group = first + len(group), []
    if group:
        yield Chunk(source, first, 1.0, rows=group)


def _jsonl(source: str, path: Path) -> Iterator[Chunk]:
    size, number, rest = path.stat().st_size, 1, b""
    with _opened(source, path) as (raw, stream):
        while block := _next_block(stream, source, number):
            head, newline, tail = block.rpartition(b"\n")
            if not newline:
                rest += tail
                if len(rest) > MAX_LINE_BYTES:
                    raise DataError(f"data: {source} line {number} is over {MAX_LINE_BYTES >> 20} MiB: is it JSONL?")
                continue
            lines = (rest + head).split(b"\n")
            rest = tail
            yield Chunk(source, number, raw.tell() / size, lines=_without_bom(lines, number))
            number += len(lines)
        if rest.strip():
            yield Chunk(source, number, 1.0, lines=_without_bom([rest], number))


def _next_block(stream: Any, source: str, number: int) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except (OSError, EOFError) as error:
        raise DataError(f"data: {source} after line {number - 1} {_damaged(error)}") from error


def _json(source: str, path: Path) -> Iterator[Chunk]:
    """One JSON array of rows; a .json file that begins with an object is JSONL under another name."""
    with _opened(source, path) as (_, stream):
        data = stream.read()
    if not data.removeprefix(BOM).lstrip().startswith(b"["):
        yield from _jsonl(source, path)
        return
    rows = _parse(data, source, list)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"data: {source} row {number} is no JSON object, it is {type(row).__name__}")
    yield from grouped(source, iter(rows), lambda read: read / len(rows))


def _csv(source: str, path: Path) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_LINE_BYTES)
    size = path.stat().st_size
    with _opened(source, path) as (raw, stream):
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        lines: Any = reader.reader  # its line_num: those read so far; DictReader's own is that of the row before
        try:
            names = list(reader.fieldnames or [])
            _check_names(source + " line 1", names)
            if len(names) == 1 and (mark := next((mark for mark in SEPARATORS if mark in names[0]), None)):
                raise DataError(
                    f"data: {source} line 1 is separated by {SEPARATORS[mark]}, not by commas: write it with commas, "
                    f'python -c "{COMMAS.format(mark)}" <OLD >NEW'
                )
            yield from grouped(source, _csv_rows(source, reader, len(names)), lambda _: raw.tell() / size)
        except csv.Error as error:
            raise DataError(f"data: {source} line {lines.line_num} is no valid CSV: {error}") from error
        except UnicodeDecodeError as error:  # of a block of which no line has been read yet
            number = lines.line_num + len((error.object[: error.start] + b"x").splitlines())
            raise DataError(f"data: {source} line {number} is {_not_utf8(error)}") from error


def _check_names(place: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"data: {place} names a column twice ({', '.join(names)[:100]}): rename one")


def _csv_rows(source: str, reader: Any, columns: int) -> Iterator[Row]:
    for row in reader:
        if None in row or None in row.values():
            found = len(row[None]) + len(row) - 1 if None in row else sum(v is not None for v in row.values())
            raise DataError(
                f"data: {source} line {reader.line_num} has {found} fields, the header has {columns}: "
                "quote fields that hold a comma or a line break"
            )
        yield row


def _parquet(source: str, path: Path, also: Collection[str]) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        total = file.metadata.num_rows
        _check_names(source, file.schema_arrow.names)
        yield from grouped(source, _parquet_rows(source, file, also), lambda read: read / total)
    except pyarrow.ArrowException as error:
        raise DataError(f"data: {source} {_damaged(error)}") from error


def _parquet_rows(source: str, file: Any, also: Collection[str]) -> Iterator[Row]:
    """Every row with the names of all columns; of those that mean nothing to us no value is read."""
    unread = dict.fromkeys(file.schema_arrow.names, beside.NOT_READ)
    wanted = [name for name in unread if formats.is_read(name) or name in also]
    number = 0
    for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=wanted):
        try:
            rows = batch.to_pylist() or [{}] * batch.num_rows
        except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python does not know
            rows = [_parquet_row(batch, at, f"{source} row {number + at + 1}") for at in range(batch.num_rows)]
        number += len(rows)
        yield from (unread | without_nulls(row) for row in rows)


def _parquet_row(batch: Any, at: int, place: str) -> Row:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch[name][at].as_py()
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"data: {place}: {name} cannot be read ({first_line(error)}); write that column anew, as UTF-8 text"
            ) from error
    return row


def without_nulls(row: Row) -> Row:
    """A row of Arrow without the keys that its column type alone brings: those of null below the columns."""
    return {name: _without_nulls(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _parse(line: bytes, place: str, kind: type = dict) -> Any:
    try:
        value = _loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"data: {place} is {_not_utf8(error)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = getattr(error, "msg", "nested too deeply")
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"data: {place} is no valid JSON: {what}{column} (is the file cut off there?)") from error
    if not isinstance(value, kind):
        raise DataError(f"data: {place} is no JSON object, it is {type(value).__name__}: a row is {{…}}")
    return value


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except ValueError:  # an integer of thousands of digits, most likely in a column that is not used
        return json.loads(line, parse_int=lambda digits: (int if len(digits) < INT_DIGITS else Decimal)(digits))


def _damaged(error: BaseException) -> str:
    return f"is cut off or damaged ({first_line(error)}): copy it again"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x}): convert it, e.g. iconv -f latin1 -t utf-8 OLD > NEW"


def _wide(start: bytes) -> str | None:
    """The encoding of a file that begins so, if it has several bytes a letter."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-16le" if start[1:2] == b"\0" else None  # {, [ or a letter, and nothing: without its mark


def _without_bom(lines: list[bytes], number: int) -> list[bytes]:
    if number == 1 and lines[0].startswith(BOM):
        lines[0] = lines[0].removeprefix(BOM)
    return lines


@contextmanager
def _opened(source: str, path: Path) -> Iterator[tuple[Any, Any]]:
    """(the file on the disk, what is in it). Raises DataError for an encoding of which no line can be read."""
    with path.open("rb") as raw, _decompressed(raw, path) as stream:
        try:
            start = stream.peek(4)[:4]
        except OSError:
            start = b""  # what is damaged from the beginning is told of by who reads
        if name := _wide(start):
            raise DataError(f"data: {source} is {name}, not UTF-8: convert it, iconv -f {name} -t utf-8 OLD > NEW")
        yield raw, stream


@contextmanager
def _decompressed(raw: Any, path: Path) -> Iterator[Any]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        yield raw
        return
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression) as stream:
        yield io.BufferedReader(stream)


def first_line(error: BaseException) -> str:
    """The first line that says something of an error's text."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
