"""Where rows come from → chunks of rows: files (JSONL, JSON and CSV, each plain, .gz or .zst, and Parquet), on this
machine or behind a URL; hub data sets (owner/name or owner/name:subset); builtin:arithmetic.

Never more than one chunk in memory, except of a JSON array; every DataError names the file and the line.
JSONL is read by hand: Arrow's reader would give each object the keys of all of them, which changes tool calls.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fasttune import hub, system
from fasttune.data import arithmetic, formats
from fasttune.data.formats import Row
from fasttune.errors import DataError, first_line, kind_and_line

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # what fsspec needs beside itself; released together with it
# How a file begins that has several bytes a letter; the last without its mark: {, [ or a letter, and nothing.
WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
WIDE |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", b"(?s:.)\0": "utf-16le"}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of what is called CSV and is not separated by commas
COMMAS = "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={!r}))"
AS_PARQUET = "write it as Parquet, python -c \"from datasets import {} as d; {}.to_parquet('rows.parquet')\""
INT_DIGITS = 600  # Python reads no longer integers than a limit, which is nowhere below 640
BLOCK_BYTES = 1 << 20  # of a JSONL file read at once
MAX_LINE_BYTES = 64 << 20
CHUNK_ROWS = 1000
BUILTIN_ROWS: dict[arithmetic.Part, int] = {"train": 2000, "test": 40}
NOT_READ = "not read"  # stands for the values of a column that means nothing here


@dataclass(frozen=True)
class Chunk:
    """Unparsed lines of JSONL, or rows. first: number of the first, from 1. done: share of the source read then."""

    source: str
    first: int
    done: float
    rows: list[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def numbered(self) -> Iterator[tuple[int, str, Row]]:
        """(number, place for an error, row) of each row; blank lines are skipped. Raises DataError."""
        for number, row in enumerate(self.rows, self.first):
            if isinstance(row, dict):
                yield number, f"{self.source} row {number}", row
            elif row.strip():
                place = f"{self.source} line {number}"
                yield number, place, _parse(row, place)


def check_source(source: str, split: str = "train") -> None:
    """Fail early, before anything heavy is imported: DataError if a file is missing or of an unknown kind."""
    path = Path(os.path.expanduser(source))  # Path's own raises for a user who is not there
    url = urlsplit(source) if "://" in source else None
    if source.startswith("builtin:"):
        if source != "builtin:arithmetic":
            raise DataError(f"data: {source} is unknown; the built-in data set is builtin:arithmetic")
    elif url or os.path.isfile(path):
        if split != "train":
            raise DataError(f"data.split={split} would be ignored: {source} is a file, it has no splits; remove it")
        if url and (url.query or "@" in url.netloc):
            why = "holds a password or a ?query, which may be secret and would be written into the run's files"
            raise DataError(f"data: the URL of {url.hostname} {why}: download the file and name it")
        if kind(source) is None:
            endings = f"use {', '.join(KINDS)} (all but the last also .gz, .zst)"
            remedy = AS_PARQUET.format("Dataset", "d.from_file('FILE')") if path.suffix == ".arrow" else endings
            raise DataError(f"data: {source} has an unknown ending; {remedy}")
        if not url and path.stat().st_size == 0:
            raise DataError(f"data: {source} is empty")
    elif os.path.isdir(path):
        remedy = "; name one file of it"
        for name, rows in (("state.json", "d('FOLDER')"), ("dataset_dict.json", "d('FOLDER')['train']")):
            if os.path.isfile(path / name):
                remedy = f" that save_to_disk wrote; {AS_PARQUET.format('load_from_disk', rows)}"
        raise DataError(f"data: {source} is a folder{remedy}")
    elif system.not_a_file(path):
        raise DataError(f"data: {source} is a pipe or a device, not a file; save what comes out of it, and name that")
    elif kind(source) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        why = f"no file {source} (looked in {Path.cwd()}); check the path, or give a hub id, owner/name"
        try:
            path.stat()
        except PermissionError:
            why = f"{source} cannot be reached: a folder on its way cannot be entered; allow it, chmod +x FOLDER"
        except (OSError, ValueError):
            pass
        raise DataError(f"data: {why}")


def kind(source: str) -> str | None:
    """jsonl, json, csv or parquet, by the ending; None for any other. Parquet compresses by itself."""
    path = Path(source.lower())
    compressed = path.suffix in COMPRESSIONS
    found = KINDS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if found == "parquet" and compressed else found


def read(
    source: str,
    part: arithmetic.Part,
    split: str = "train",
    max_rows: int | None = None,
    streaming: bool = False,
    also: Collection[str] = (),
) -> Iterator[Chunk]:
    """The rows of a source in its order, chunk by chunk. `part` is of a built-in set, `split` of a hub set, which
    `streaming` reads without downloading all of it first; `also`: columns to read beside those that formats.is_read.
    """
    check_source(source, split)
    if source == "builtin:arithmetic":
        rows = arithmetic.generate(part, rows=max_rows or BUILTIN_ROWS[part])
        chunks = _grouped(source, iter(rows), lambda read: read / len(rows))
    elif path := _file(source):
        chunks = _file_chunks(source, path, also)
    else:
        chunks = _hub(source, split, streaming, also)
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
    source: str, part: arithmetic.Part, split: str, rows: int, streaming: bool = False, also: Collection[str] = ()
) -> Iterator[tuple[int, str, Row]]:
    """The first rows of a source, as Chunk.numbered gives them."""
    for chunk in read(source, part, split, rows, streaming, also):
        yield from chunk.numbered()


def fingerprint(source: str, part: arithmetic.Part, split: str) -> str:
    """Hash of a source's content (of a file's bytes, or of a hub data set's revision): what a cache is keyed by."""
    if source == "builtin:arithmetic":
        return hashlib.sha256(json.dumps(arithmetic.generate(part, rows=BUILTIN_ROWS[part])).encode()).hexdigest()
    path = _file(source)
    if path is None:
        import datasets

        commit = _ask_hub(source, datasets.load_dataset_builder).hash  # of the local copy where the hub is away
        return f"{source} {split} {commit}"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data: {source} cannot be read: {error.strerror}") from error


def _file(source: str) -> Path | None:
    """The file of a source, downloaded once a process where it is behind a URL; None for a hub data set."""
    if "://" not in source:
        path = os.path.expanduser(source)
        return Path(path) if os.path.isfile(path) else None
    import fsspec

    try:
        with fsspec.open(f"simplecache::{source}") as file:
            return Path(file.name)  # of a temporary copy
    except ImportError as error:
        package = PACKAGES.get(source.partition("://")[0])
        remedy = f"pip install {package}=={fsspec.__version__}" if package else "download the file and name it"
        raise DataError(f"data: {source} needs a package that is not installed ({error}): {remedy}") from error
    except Exception as error:  # of whatever library speaks the protocol
        why = f"cannot be downloaded ({kind_and_line(error)}); check the address, or download the file and name it"
        raise DataError(f"data: {source} {why}") from error


def _file_chunks(source: str, path: Path, also: Collection[str]) -> Iterator[Chunk]:
    """All rows of a file. Of Parquet only the columns that mean something, and `also`. Raises DataError."""
    readers: dict[str, Any] = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": partial(_parquet, also=also)}
    try:
        yield from readers[kind(source) or ""](source, path)
    except OSError as error:
        what = f"cannot be read: {error.strerror}" if error.strerror else _damaged(error)  # pyarrow's has no strerror
        raise DataError(f"data: {source} {what}") from error


def _grouped(source: str, rows: Iterator[Row], done: Callable[[int], float]) -> Iterator[Chunk]:
    """Rows as chunks; `done(rows read)`: how much of the source that is, 0 to 1."""
    first = 1
    while group := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(source, first, done(first - 1 + len(group)), group)
        first += len(group)


@contextmanager
def _opened(source: str, path: Path) -> Iterator[tuple[Any, Any, bytes]]:
    """(the file on the disk, what is in it, how that begins), after the mark of UTF-8. Other encodings are refused."""
    with path.open("rb") as raw:
        stream: Any = raw
        if compression := COMPRESSIONS.get(Path(source).suffix.lower()):
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, compression))
        try:
            start = stream.peek()
        except OSError:
            start = b""  # what is damaged from the beginning is reported by who reads
        if name := next((name for mark, name in WIDE.items() if re.match(mark, start)), None):
            raise DataError(f"data: {source} is {name}, not UTF-8: convert it, iconv -f {name} -t utf-8 OLD > NEW")
        if start.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield raw, stream, start.removeprefix(codecs.BOM_UTF8)


def _jsonl(source: str, path: Path) -> Iterator[Chunk]:
    size, number, rest = path.stat().st_size, 1, b""
    with _opened(source, path) as (raw, stream, _):
        try:
            while block := stream.read(BLOCK_BYTES):
                head, newline, tail = block.rpartition(b"\n")
                if newline:
                    lines, rest = (rest + head).split(b"\n"), tail
                    yield Chunk(source, number, raw.tell() / size, lines)
                    number += len(lines)
                elif len(rest := rest + tail) > MAX_LINE_BYTES:
                    raise DataError(f"data: {source} line {number} is over {MAX_LINE_BYTES >> 20} MiB: is it JSONL?")
        except OSError as error:
            raise DataError(f"data: {source} after line {number - 1} {_damaged(error)}") from error
        if rest.strip():
            yield Chunk(source, number, 1.0, [rest])


def _json(source: str, path: Path) -> Iterator[Chunk]:
    """One JSON array of rows; a .json file that begins otherwise is JSONL under another name."""
    with _opened(source, path) as (_, stream, start):
        if not start.lstrip().startswith(b"["):
            yield from _jsonl(source, path)
            return
        rows = _parse(stream.read(), source, list)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"data: {source} row {number} is no JSON object, it is {type(row).__name__}")
    yield from _grouped(source, iter(rows), lambda read: read / len(rows))


def _csv(source: str, path: Path) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with _opened(source, path) as (raw, stream, _):
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8", newline=""), strict=True)
        try:
            names = next(reader, [])
            _check_names(f"{source} line 1", names)
            if len(names) == 1 and (mark := next((mark for mark in SEPARATORS if mark in names[0]), None)):
                raise DataError(
                    f"data: {source} line 1 is separated by {SEPARATORS[mark]}, not by commas: write it with commas, "
                    f'python -c "{COMMAS.format(mark)}" <OLD >NEW'
                )
            yield from _grouped(source, _csv_rows(source, reader, names), lambda _: raw.tell() / path.stat().st_size)
        except csv.Error as error:
            raise DataError(f"data: {source} line {reader.line_num} is no valid CSV: {error}") from error
        except UnicodeDecodeError as error:  # of a block of which no line has been read yet
            number = reader.line_num + len((error.object[: error.start] + b"x").splitlines())
            raise DataError(f"data: {source} line {number} is {_not_utf8(error)}") from error


def _csv_rows(source: str, reader: Any, names: list[str]) -> Iterator[Row]:
    for fields in reader:
        if fields and len(fields) != len(names):
            what = f"has {len(fields)} fields, the header has {len(names)}: quote those with a comma or a line break"
            raise DataError(f"data: {source} line {reader.line_num} {what}")
        if fields:  # a blank line has none
            yield dict(zip(names, fields, strict=True))


def _check_names(place: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"data: {place} names a column twice ({', '.join(names)[:100]}): rename one")


def _parquet(source: str, path: Path, also: Collection[str]) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        total = file.metadata.num_rows
        _check_names(source, file.schema_arrow.names)
        yield from _grouped(source, _parquet_rows(source, file, also), lambda read: read / total)
    except pyarrow.ArrowException as error:
        raise DataError(f"data: {source} {_damaged(error)}") from error


def _parquet_rows(source: str, file: Any, also: Collection[str]) -> Iterator[Row]:
    """Every row with the names of all columns; of those that mean nothing to us no value is read."""
    unread, wanted = _columns(file.schema_arrow.names, also)
    number = 0
    for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=wanted):
        try:
            rows = batch.to_pylist() or [{}] * batch.num_rows
        except (ValueError, OverflowError):
            _name_unreadable(batch, source, number)
            raise
        number += len(rows)
        yield from (unread | _without_nulls(row) for row in rows)


def _name_unreadable(batch: Any, source: str, before: int) -> None:
    """Raise DataError for the first value that Python cannot hold: text that is not UTF-8, a date it does not know."""
    for at, name in product(range(batch.num_rows), batch.schema.names):
        try:
            batch[name][at].as_py()
        except (ValueError, OverflowError) as error:
            what = f"{name} cannot be read ({first_line(error)}); write that column again, as UTF-8 text"
            raise DataError(f"data: {source} row {before + at + 1}: {what}") from error


def _columns(names: Collection[str], also: Collection[str]) -> tuple[Row, list[str]]:
    """(every column, none of them read; the names of those to read)."""
    return dict.fromkeys(names, NOT_READ), [name for name in names if formats.is_read(name) or name in also]


def _without_nulls(row: Row) -> Row:
    """A row of Arrow without the keys that its column type alone brings: those of null below the columns."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pruned(part) for key, part in value.items() if part is not None}
        return [pruned(part) for part in value] if isinstance(value, list) else value

    return {name: pruned(value) for name, value in row.items()}


def _hub(source: str, split: str, streaming: bool, also: Collection[str]) -> Iterator[Chunk]:
    import datasets

    rows = _ask_hub(source, lambda *name: datasets.load_dataset(*name, split=split, streaming=streaming))
    total = 0 if isinstance(rows, datasets.IterableDataset) else len(rows)
    unread, wanted = _columns(rows.column_names or (), also)  # a stream may not know its columns
    whole = (unread | _without_nulls(row) for row in (rows.select_columns(wanted) if wanted else rows))
    yield from _grouped(source, whole, lambda read: read / total if total else 0.0)


def _ask_hub(source: str, ask: Callable[..., Any]) -> Any:
    """What `ask(name, subset)` gets from the hub or its local copy. Raises DataError."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    name, _, subset = source.partition(":")
    try:
        return hub.patiently(lambda: ask(name, subset or None))
    except TimeoutError as error:
        raise DataError(f"data: {source}: {error}; try again later, or download it and give the file") from error
    except (OSError, ValueError, NotImplementedError, DatasetGenerationError) as error:
        why = f"cannot be loaded ({first_line(error)}); check the id and split, `hf auth login` for a gated set"
        if hub.is_offline():
            why = "is no file and not in the cache, and HF_HUB_OFFLINE is set; check the path, unset it, or load it "
            why += f"once where there is a network ({first_line(error)})"
        raise DataError(f"data: {source} {why}, or download it and give the file") from error


def _parse(text: bytes, place: str, kind: type = dict) -> Any:
    try:
        try:
            value = json.loads(text)
        except ValueError as error:
            if isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
                raise
            # an integer of thousands of digits, most likely in a column that is not used
            value = json.loads(text, parse_int=lambda digits: (int if len(digits) < INT_DIGITS else Decimal)(digits))
    except UnicodeDecodeError as error:
        raise DataError(f"data: {place} is {_not_utf8(error)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "nested too deeply"
        raise DataError(f"data: {place} is no valid JSON: {what} (is the file cut off there?)") from error
    if not isinstance(value, kind):
        raise DataError(f"data: {place} is no JSON object, it is {type(value).__name__}: a row is {{…}}")
    return value


def _damaged(error: BaseException) -> str:
    return f"is cut off or damaged ({first_line(error)}): copy it again"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}): convert it, e.g. iconv -f latin1 -t utf-8 OLD > NEW"
