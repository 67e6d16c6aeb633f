"""Rows that Arrow reads → chunks of rows: Parquet files and hub data sets (saved.py: those on this
disk). A column that means nothing is not read.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from fasttune import hub as hub_is
from fasttune.data import formats
from fasttune.data.files import check_names, damaged
from fasttune.data.formats import Row
from fasttune.data.sources import CHUNK_ROWS, Chunk, grouped
from fasttune.errors import DataError, first_line, in_one_line

NOT_READ = "not read"  # stands for the values of a column that means nothing here


def parquet(source: str, path: Path, also: Collection[str]) -> Iterator[Chunk]:
    """The rows of a file, of which only the columns that mean something, and `also`, are read. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        total = file.metadata.num_rows
        check_names(source, file.schema_arrow.names)
        unread, wanted = columns(file.schema_arrow.names, also)
        batches = file.iter_batches(batch_size=CHUNK_ROWS, columns=wanted)
        yield from grouped(source, rows(source, batches, unread), lambda read: read / total)
    except pyarrow.ArrowException as error:
        raise DataError(f"data: {source} {damaged(error)}") from error


def rows(source: str, batches: Iterable[Any], unread: Row, number: int = 0) -> Iterator[Row]:
    """Every row of record batches with the names of all columns; of those that mean nothing to us no value is read.

    number: of the rows before. Raises DataError.
    """
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK_ROWS):
            part = batch.slice(start, CHUNK_ROWS)
            try:
                found = part.to_pylist() or [{}] * part.num_rows
            except (ValueError, OverflowError):
                _name_unreadable(part, source, number)
                raise
            number += len(found)
            yield from (unread | _without_nulls(row) for row in found)


def _name_unreadable(batch: Any, source: str, before: int) -> None:
    """Raise DataError for the first value that Python cannot hold: text that is not UTF-8, a date it does not know."""
    for at, name in product(range(batch.num_rows), batch.schema.names):
        try:
            batch[name][at].as_py()
        except (ValueError, OverflowError) as error:
            what = f"{name} cannot be read ({first_line(error)}); write that column again, as UTF-8 text"
            raise DataError(f"data: {source} row {before + at + 1}: {what}") from error


def columns(names: Collection[str], also: Collection[str]) -> tuple[Row, list[str]]:
    """(every column, none of them read; the names of those to read)."""
    return dict.fromkeys(names, NOT_READ), [name for name in names if formats.is_read(name) or name in also]


def _without_nulls(row: Row) -> Row:
    """A row of Arrow without the keys that its column type alone brings: those of null below the columns."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pruned(part) for key, part in value.items() if part is not None}
        return [pruned(part) for part in value] if isinstance(value, list) else value

    return {name: pruned(value) for name, value in row.items()}


def hub(source: str, split: str, streaming: bool, also: Collection[str]) -> Iterator[Chunk]:
    """The rows of a split of owner/name or owner/name:subset. Raises DataError."""
    import datasets

    found = _ask_hub(source, lambda *name: datasets.load_dataset(*name, split=split, streaming=streaming))
    total = 0 if isinstance(found, datasets.IterableDataset) else len(found)
    unread, wanted = columns(found.column_names or (), also)  # a stream may not know its columns
    whole = (unread | _without_nulls(row) for row in (found.select_columns(wanted) if wanted else found))
    yield from grouped(source, whole, lambda read: read / total if total else 0.0)


def revision(source: str) -> str:
    """The commit of a hub data set, or of the local copy where the hub is away. Raises DataError."""
    import datasets

    return str(_ask_hub(source, datasets.load_dataset_builder).hash)


def rows_of(source: str, split: str) -> int:
    """How many rows a split has, as the hub says; nothing is downloaded. Raises DataError."""
    import datasets

    fix = "give a file, or download the set and name the file"
    with in_one_line(DataError, f"data: the hub does not say how many rows {source} has", fix):
        return int(_ask_hub(source, datasets.load_dataset_builder).info.splits[split].num_examples)


def _ask_hub(source: str, ask: Callable[..., Any]) -> Any:
    """What `ask(name, subset)` gets from the hub or its local copy. Raises DataError."""
    import datasets
    import httpx
    import huggingface_hub
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    hub_is.look()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it asks a busy hub again by itself, and says so
    name, _, subset = source.partition(":")
    try:
        return ask(name, subset or None)
    except (OSError, ValueError, NotImplementedError, DatasetGenerationError, httpx.HTTPError) as error:
        why = f"cannot be loaded ({first_line(error)}); check the id and split, `hf auth login` for a gated set, try "
        why += "again later"
        if away := hub_is.away():
            raise DataError(f"data: {source} is no file, and the hub is out of reach ({away}): give a file") from error
        if huggingface_hub.is_offline_mode():
            why = "is no file and not in the cache, and HF_HUB_OFFLINE is set; check the path, unset it, or load it "
            why += f"once where there is a network ({first_line(error)})"
        raise DataError(f"data: {source} {why}, or download it and give the file") from error
