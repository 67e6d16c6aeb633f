"""Folders that `save_to_disk` of the library datasets wrote → chunks of rows, a record batch in memory at a time.

    DATASET/        state.json: which .arrow files it has, in their order   dataset_info.json   data-*.arrow
    DATASET_DICT/   dataset_dict.json: the names of its splits, each a folder as above

Source: datasets/arrow_dataset.py and dataset_dict.py (4.8). The library itself is not imported: that takes a second.
"""

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fasttune.data import arrow
from fasttune.data.files import check_names, damaged
from fasttune.data.formats import Row
from fasttune.data.sources import Chunk, grouped
from fasttune.errors import DataError
from fasttune.settings import DATASET_DICT

STATE, INFO = "state.json", "dataset_info.json"
END = (
    b"\xff\xff\xff\xff\0\0\0\0"  # of a stream: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
)


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote it."""
    return _is_dict(folder) or all(os.path.isfile(folder / name) for name in (STATE, INFO))


def _is_dict(folder: Path) -> bool:
    return os.path.isfile(folder / DATASET_DICT)


def find(source: str, folder: Path, split: str) -> list[Path]:
    """The files of a data set, or of a split of several, in the order of its rows. Raises DataError."""
    if _is_dict(folder):
        splits = _read(source, folder / DATASET_DICT).get("splits")
        if not isinstance(splits, list) or split not in splits:
            there = ", ".join(map(str, splits or ["none"]))
            raise DataError(f"data: {source} has no split {split}, it has {there}: set data.split (data.eval_split)")
        folder = folder / split
    elif split != "train":
        raise DataError(f"data.split={split} would be ignored: {source} holds one data set, no splits; remove it")
    state = _read(source, folder / STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"data: {source} was saved by datasets 1: load it with load_from_disk, and save it again by 4")
    try:
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (TypeError, KeyError) as error:
        raise _unreadable(source, STATE) from error
    for name in names:
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise DataError(f"data: {source}: {STATE} names {name[:100]}, which is not there: copy the folder again")
    return [folder / name for name in names]


def _read(source: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(source, path.name) from error
    if not isinstance(found, dict):
        raise _unreadable(source, path.name)
    return found


def _unreadable(source: str, name: str) -> DataError:
    return DataError(f"data: {source}: {name} is not what save_to_disk writes, or damaged: copy the folder again")


def read(source: str, paths: list[Path], also: Collection[str]) -> Iterator[Chunk]:
    """The rows of all files as one data set, of which only the columns that mean something, and `also`, are read.

    Raises DataError.
    """
    sizes, place = [path.stat().st_size for path in paths], [0]  # how far it is read, in bytes of all files

    def rows() -> Iterator[Row]:
        number = 0
        for at, path in enumerate(paths):
            for row in _rows(source, path, also, number, place, sum(sizes[:at])):
                number += 1
                yield row

    yield from grouped(source, rows(), lambda _: min(1.0, place[0] / sum(sizes)))


def _rows(source: str, path: Path, also: Collection[str], number: int, place: list[int], before: int) -> Iterator[Row]:
    """The rows of a file, behind `number` rows and `before` bytes."""
    import pyarrow
    import pyarrow.ipc

    try:
        with path.open("rb") as opened:
            opened.seek(max(0, path.stat().st_size - len(END)))
            if opened.read() != END:
                raise DataError(f"data: {source}: {path.name} is cut off: copy it again")
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            check_names(source, stream.schema.names)
            unread, wanted = arrow.columns(stream.schema.names, also)

            def batches() -> Iterator[Any]:
                for batch in stream:
                    place[0] = before + file.tell()
                    yield batch.select(wanted)

            yield from arrow.rows(source, batches(), unread, number)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"data: {source}: {path.name} {damaged(error)}") from error
