"""Files of rows → chunks of rows: JSONL, JSON, CSV and text (texts.py), each plain, .gz or .zst, and Parquet
(arrow.py); on this machine, a folder or a pattern of them, or one behind a URL.

JSONL is read by hand: Arrow's reader would give each object the keys of all of them, which changes tool calls.
"""

import codecs
import csv
import glob
import io
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fasttune import system
from fasttune.data.formats import Row
from fasttune.data.sources import Chunk, grouped, is_pattern, not_utf8, parse
from fasttune.errors import DataError, first_line, kind_and_line
from fasttune.settings import TOKENS

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # what fsspec needs beside itself; released together with it
# How a file begins that has several bytes a letter; the last without its mark: {, [ or a letter, and nothing.
WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
WIDE |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", b"(?s:.)\0": "utf-16le"}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of what is called CSV and is not separated by commas
COMMAS = "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={!r}))"
ARROW = ".arrow"  # of folders that save_to_disk wrote
AS_PARQUET = "name the folder that save_to_disk wrote, or write it as Parquet, "
AS_PARQUET += "python -c \"from datasets import Dataset as d; d.from_file('FILE').to_parquet('rows.parquet')\""
BLOCK_BYTES = 1 << 20  # of a JSONL file read at once
MAX_LINE_BYTES = 64 << 20


def check(source: str, split: str) -> None:
    """DataError for what is missing or of an unknown kind; what may be a hub id passes."""
    path = Path(os.path.expanduser(source))  # Path's own raises for a user who is not there
    url = urlsplit(source) if "://" in source else None
    if url or os.path.isfile(path):
        _check_one(source, path, url, split)
    elif os.path.isdir(path) or is_pattern(source):
        _check_several(source, path, split)
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


def _check_one(source: str, path: Path, url: Any, split: str) -> None:
    _check_no_split(source, split, "file")
    if url and (url.query or "@" in url.netloc):
        why = "holds a password or a ?query, which may be secret and would be written into the run's files"
        raise DataError(f"data: the URL of {url.hostname} {why}: download the file and name it")
    if source.endswith(TOKENS) and not url:
        if not path.with_suffix(".idx").is_file():
            raise DataError(f"data: {source}: no file {path.with_suffix('.idx')} beside it; copy both there")
    elif kind(source) is None:
        endings = f"use {', '.join(KINDS)} (all but the last also .gz, .zst)"
        remedy = AS_PARQUET if path.suffix == ARROW else endings
        raise DataError(f"data: {source} has an unknown ending; {remedy}")
    if not url and path.stat().st_size == 0:
        raise DataError(f"data: {source} is empty")


def _check_several(source: str, path: Path, split: str) -> None:
    from fasttune.data import saved

    if os.path.isdir(path) and saved.is_saved(path):
        saved.find(source, path, split)
        return
    _check_no_split(source, split, "folder" if os.path.isdir(path) else "pattern")
    read, others = several(source)
    for folder in sorted({each.parent for each in (*read, *others)}):
        if saved.is_saved(folder):
            raise DataError(f"data: {source}: save_to_disk wrote {folder}, which is no folder of files: name it alone")
    if not read:
        found = f"none of its {len(others):,} files ends in one of" if others else "no file there ends in one of"
        raise DataError(f"data: {source}: {found} {', '.join(KINDS)}; check the path")


def _check_no_split(source: str, split: str, what: str) -> None:
    if split != "train":
        raise DataError(f"data.split={split} would be ignored: {source} is a {what}, it has no splits; remove it")


def several(source: str) -> tuple[list[Path], list[Path]]:
    """(files of rows, what is left out: other files, and links to what is read) of a folder with all below it, or of a
    pattern, in the order of their names.

    Hidden ones are none of both; of a folder that save_to_disk wrote (saved.py) all are read, and none is here.
    """
    place = os.path.expanduser(source)
    names = _matching(source, place) if is_pattern(source) else _below(source, place)
    found = sorted({Path(name) for name in names})
    real_folders = {folder: os.path.realpath(folder) for folder in {path.parent for path in found}}
    first = dict[str, Path]()  # real name → the file that is read, before links to it
    for path in sorted(filter(Path.is_file, found), key=Path.is_symlink):
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(real_folders[path.parent], path.name)
        first.setdefault(real, path)
    read = {path for path in first.values() if kind(path.name)}
    return [path for path in found if path in read], [path for path in found if path not in read]


def _below(source: str, place: str) -> Iterator[str]:
    """All files in a folder, through links too, and the links to folders that are left out."""
    for folder, names in _folders(source, place):
        yield from [folder] if names is None else (os.path.join(folder, name) for name in names)


def _folders(source: str, place: str) -> Iterator[tuple[str, list[str] | None]]:
    """(folder, its files) of all folders below, through links too, but none twice: a link may lead back to where it
    stands. None in place of the files: a link to a folder that was there before.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"data: {source}: {error.filename} cannot be read: {error.strerror}") from error

    seen = set[str]()
    for folder, inside, names in os.walk(place, followlinks=True, onerror=refuse):
        inside[:], names = (sorted(name for name in each if not name.startswith(".")) for each in (inside, names))
        if (real := os.path.realpath(folder)) not in seen:
            yield folder, names
        else:
            inside.clear()
            yield from [(folder, None)] * os.path.islink(folder)
        seen.add(real)


def _matching(source: str, pattern: str) -> Iterator[str]:
    """What a pattern names. ** as in _folders: glob would follow a link back to where it stands over and over."""
    before, stars, after = f"/{pattern}/".partition("/**/")
    if not stars:
        yield from (name for name in glob.iglob(pattern) if not os.path.isdir(name))
        return
    for place in glob.iglob(before[1:] or ("/" if pattern.startswith("/") else ".")):
        for folder, names in _folders(source, place):
            inside = _matching(source, os.path.join(glob.escape(folder), after.rstrip("/") or "*"))
            yield from [folder] if names is None else inside


def kind(source: str) -> str | None:
    """jsonl, json, csv, text or parquet, by the ending; None for any other. Parquet compresses by itself."""
    path = Path(source.lower())
    compressed = path.suffix in COMPRESSIONS
    found = KINDS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if found == "parquet" and compressed else found


def find(source: str, split: str = "train") -> list[Path]:
    """The files of a source, downloaded once a process where it is behind a URL; none of a hub data set. `split`: of a
    folder that save_to_disk wrote.
    """
    if "://" not in source:
        path = os.path.expanduser(source)
        if os.path.isfile(path):
            return [Path(path)]
        if os.path.isdir(path):
            from fasttune.data import saved

            if saved.is_saved(Path(path)):
                return saved.find(source, Path(path), split)
        return several(source)[0] if os.path.isdir(path) or is_pattern(source) else []
    import fsspec

    try:
        with fsspec.open(f"simplecache::{source}") as file:
            return [Path(file.name)]  # of a temporary copy
    except ImportError as error:
        package = PACKAGES.get(source.partition("://")[0])
        remedy = f"pip install {package}=={fsspec.__version__}" if package else "download the file and name it"
        raise DataError(f"data: {source} needs a package that is not installed ({error}): {remedy}") from error
    except Exception as error:  # of whatever library speaks the protocol
        why = f"cannot be downloaded ({kind_and_line(error)}); check the address, or download the file and name it"
        raise DataError(f"data: {source} {why}") from error


def read_all(source: str, paths: list[Path], also: Collection[str], documents: str | None) -> Iterator[Chunk]:
    """All rows of all files of a source, one file after the other. Raises DataError."""
    if paths[0].suffix == ARROW:
        from fasttune.data import saved

        yield from saved.read(source, paths, also)
        return
    if len(paths) == 1 and not is_pattern(source) and not os.path.isdir(os.path.expanduser(source)):
        yield from read(source, paths[0], also, documents)
        return
    sizes = [path.stat().st_size for path in paths]
    before = size_before = 0
    for path, size in zip(paths, sizes, strict=True):
        last = 0
        for chunk in read(str(path), path, also, documents):
            last = chunk.first + len(chunk) - 1
            yield replace(chunk, before=before, done=(size_before + chunk.done * size) / max(1, sum(sizes)))
        before, size_before = before + last, size_before + size


def read(source: str, path: Path, also: Collection[str], documents: str | None = None) -> Iterator[Chunk]:
    """All rows of a file. Of Parquet only the columns that mean something, and `also`; `documents` of a text, as in
    settings.DataConfig. Raises DataError."""
    readers: dict[str, Any] = {"jsonl": _jsonl, "json": _json, "csv": _csv}
    try:
        if kind(source) == "parquet":
            from fasttune.data import arrow

            yield from arrow.parquet(source, path, also)
        elif kind(source) == "text":
            from fasttune.data import texts

            yield from texts.read(source, path, documents)
        else:
            yield from readers[kind(source) or ""](source, path)
    except OSError as error:
        what = f"cannot be read: {error.strerror}" if error.strerror else damaged(error)  # pyarrow's has no strerror
        raise DataError(f"data: {source} {what}") from error


@contextmanager
def opened(source: str, path: Path) -> Iterator[tuple[Any, Any, bytes]]:
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
    with opened(source, path) as (raw, stream, _):
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
            raise DataError(f"data: {source} after line {number - 1} {damaged(error)}") from error
        if rest.strip():
            yield Chunk(source, number, 1.0, [rest])


def _json(source: str, path: Path) -> Iterator[Chunk]:
    """One JSON array of rows; a .json file that begins otherwise is JSONL under another name."""
    with opened(source, path) as (_, stream, start):
        if not start.lstrip().startswith(b"["):
            yield from _jsonl(source, path)
            return
        rows = parse(stream.read(), source, list)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"data: {source} row {number} is no JSON object, it is {type(row).__name__}")
    yield from grouped(source, iter(rows), lambda read: read / len(rows))


def _csv(source: str, path: Path) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with opened(source, path) as (raw, stream, _):
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8", newline=""), strict=True)
        try:
            names = next(reader, [])
            check_names(f"{source} line 1", names)
            if len(names) == 1 and (mark := next((mark for mark in SEPARATORS if mark in names[0]), None)):
                raise DataError(
                    f"data: {source} line 1 is separated by {SEPARATORS[mark]}, not by commas: write it with commas, "
                    f'python -c "{COMMAS.format(mark)}" <OLD >NEW'
                )
            yield from grouped(source, _csv_rows(source, reader, names), lambda _: raw.tell() / path.stat().st_size)
        except csv.Error as error:
            raise DataError(f"data: {source} line {reader.line_num} is no valid CSV: {error}") from error
        except UnicodeDecodeError as error:  # of a block of which no line has been read yet
            number = reader.line_num + len((error.object[: error.start] + b"x").splitlines())
            raise DataError(f"data: {source} line {number} is {not_utf8(error)}") from error


def _csv_rows(source: str, reader: Any, names: list[str]) -> Iterator[Row]:
    for fields in reader:
        if fields and len(fields) != len(names):
            what = f"has {len(fields)} fields, the header has {len(names)}: quote those with a comma or a line break"
            raise DataError(f"data: {source} line {reader.line_num} {what}")
        if fields:  # a blank line has none
            yield dict(zip(names, fields, strict=True))


def check_names(place: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"data: {place} names a column twice ({', '.join(names)[:100]}): rename one")


def damaged(error: BaseException) -> str:
    return f"is cut off or damaged ({first_line(error)}): copy it again"
