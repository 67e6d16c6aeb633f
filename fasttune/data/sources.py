"""Where rows come from: JSONL, JSON, CSV (each plain, .gz or .zst) and Parquet files, hub data sets (owner/name or
owner/name:subset) and builtin:arithmetic → chunks of rows. Nothing here holds more than one chunk in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasttune import hub, system
from fasttune.data import arithmetic, beside, files, formats
from fasttune.data.files import Chunk, first_line, grouped
from fasttune.data.formats import Row
from fasttune.errors import DataError

AS_PARQUET = "write it as Parquet, python -c \"from datasets import {} as d; {}.to_parquet('rows.parquet')\""
BUILTIN_ROWS: dict[arithmetic.Part, int] = {"train": 2000, "test": 40}


def check(source: str, split: str = "train") -> None:
    """Fail early, before anything heavy is imported: DataError if a file is missing or of an unknown kind."""
    if source.startswith("builtin:"):
        if source != "builtin:arithmetic":
            raise DataError(f"data: {source} is unknown; the built-in data set is builtin:arithmetic")
        return
    path = _path(source)
    if os.path.isfile(path):
        if split != "train":
            raise DataError(f"data.split={split} would be ignored: {source} is a file, it has no splits; remove it")
        if files.kind(path) is None:
            endings = f"use {', '.join(files.KINDS)} (all but the last also .gz, .zst)"
            remedy = AS_PARQUET.format("Dataset", "d.from_file('FILE')") if path.suffix == ".arrow" else endings
            raise DataError(f"data: {source} has an unknown ending; {remedy}")
        if path.stat().st_size == 0:
            raise DataError(f"data: {source} is empty")
    elif os.path.isdir(path):
        for name, rows in (("state.json", "d('FOLDER')"), ("dataset_dict.json", "d('FOLDER')['train']")):
            if os.path.isfile(path / name):
                remedy = AS_PARQUET.format("load_from_disk", rows)
                raise DataError(f"data: {source} is a folder that save_to_disk wrote; {remedy}")
        raise DataError(f"data: {source} is a folder; name one file of it")
    elif system.not_a_file(path):
        raise DataError(f"data: {source} is a pipe or a device, not a file; save what comes out of it, and name that")
    elif files.kind(path) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        _check_reachable(source, path)
        raise DataError(
            f"data: no file {source} (looked in {Path.cwd()}); check the path, or give a hub id, owner/name"
        )


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # Path's own raises for a user who is not there


def _check_reachable(source: str, path: Path) -> None:
    try:
        path.stat()
    except PermissionError as error:
        raise DataError(
            f"data: {source} cannot be reached: a folder on its way cannot be entered ({error.strerror}); allow it, "
            "chmod +x FOLDER, or copy the file"
        ) from error
    except (OSError, ValueError):
        return


def read(
    source: str,
    part: arithmetic.Part,
    split: str = "train",
    max_rows: int | None = None,
    streaming: bool = False,
    also: Collection[str] = (),
) -> Iterator[Chunk]:
    """The rows of a source in its order, chunk by chunk. `part` is of a built-in set (train or held-out), `split` of a
    hub set, which `streaming` reads without downloading all of it first; `also`: columns beside those that mean
    something by their own name (formats.is_read). Raises DataError with the place.
    """
    check(source, split)
    left = max_rows
    for chunk in _chunks(source, part, split, max_rows, streaming, also):
        if left is not None:
            chunk, left = _at_most(chunk, left)
        yield chunk
        if left == 0:
            return


def first_rows(
    source: str,
    part: arithmetic.Part,
    split: str,
    rows: int,
    streaming: bool = False,
    also: Collection[str] = (),
) -> Iterator[tuple[int, str, Row]]:
    """The first rows of a source, as Chunk.numbered gives them."""
    for chunk in read(source, part, split, rows, streaming, also):
        yield from chunk.numbered()


def _at_most(chunk: Chunk, rows: int) -> tuple[Chunk, int]:
    """The chunk's first rows, and how many are wanted after them. Blank lines are no rows."""
    if chunk.lines is None:
        kept = (chunk.rows or [])[:rows]
        return replace(chunk, rows=kept), rows - len(kept)
    filled = [at for at, line in enumerate(chunk.lines) if line.strip()][:rows]
    lines = chunk.lines[: filled[-1] + 1] if len(filled) == rows else chunk.lines
    return replace(chunk, lines=lines), rows - len(filled)


def fingerprint(source: str, part: arithmetic.Part, split: str) -> str:
    """Hash of a source's content (of a file's bytes, or of a hub data set's revision): what a cache is keyed by."""
    if source == "builtin:arithmetic":
        return hashlib.sha256(json.dumps(arithmetic.generate(part, rows=BUILTIN_ROWS[part])).encode()).hexdigest()
    path = _path(source)
    if not os.path.isfile(path):
        import datasets

        commit = _ask_hub(source, datasets.load_dataset_builder).hash  # of the local copy where the hub is away
        return f"{source} {split} {commit}"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data: {source} cannot be read: {error.strerror}") from error


def _chunks(
    source: str, part: arithmetic.Part, split: str, max_rows: int | None, streaming: bool, also: Collection[str]
) -> Iterator[Chunk]:
    if source == "builtin:arithmetic":
        rows = arithmetic.generate(part, rows=max_rows or BUILTIN_ROWS[part])
        yield from grouped(source, iter(rows), lambda read: read / len(rows))
    elif os.path.isfile(_path(source)):
        yield from files.read(source, _path(source), also)
    else:
        yield from _hub(source, split, streaming, also)


def _hub(source: str, split: str, streaming: bool, also: Collection[str]) -> Iterator[Chunk]:
    import datasets

    rows = _ask_hub(source, lambda *name: datasets.load_dataset(*name, split=split, streaming=streaming))
    total = None if isinstance(rows, datasets.IterableDataset) else len(rows)
    unread = dict.fromkeys(rows.column_names or (), beside.NOT_READ)  # a stream may not know its columns
    wanted = [name for name in unread if formats.is_read(name) or name in also]
    rows = rows.select_columns(wanted) if wanted else rows
    yield from grouped(
        source, (unread | files.without_nulls(row) for row in rows), lambda read: read / total if total else 0.0
    )


def _ask_hub(source: str, ask: Callable[..., Any]) -> Any:
    """What `ask(name, subset)` gets from the hub or its local copy. Raises DataError with the remedy."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    name, _, subset = source.partition(":")
    try:
        return hub.patiently(lambda: ask(name, subset or None))
    except TimeoutError as error:
        raise DataError(f"data: {source}: {error}; try again later, or download it and give the file") from error
    except (OSError, ValueError, NotImplementedError, DatasetGenerationError) as error:
        if hub.is_offline():
            raise DataError(
                f"data: {source} is no file and not in the cache, and HF_HUB_OFFLINE is set; check the path, unset it, "
                f"or load it once where there is a network, or give a file ({first_line(error)})"
            ) from error
        raise DataError(
            f"data: {source} cannot be loaded ({first_line(error)}); check the id and split, `hf auth login` for a "
            "gated set, or download it and give the file"
        ) from error
