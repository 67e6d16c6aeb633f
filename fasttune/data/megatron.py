"""Token ids as Megatron keeps them: PREFIX.bin, ids end to end, and PREFIX.idx, where sequences and documents begin.

PREFIX.idx, version 1, little-endian:

    magic 9 bytes · version u64 · dtype u8 · sequences u64 · boundaries u64 = documents + 1
    tokens of each sequence i32 · its first byte in .bin i64 · boundaries i64: the sequence each document begins with

Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.1, which reads and writes the same bytes.
"""

import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttune.errors import DataError, OutputError, in_one_line

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
SMALL_VOCABULARY = 65_500  # below it ids take two bytes, as DType.optimal_dtype of the source chooses
BLOCK = 1 << 20  # numbers that are looked at or written at once
LONGEST = 2**31 - 1  # tokens of a sequence


@dataclass(frozen=True)
class Documents:
    """The documents of an open PREFIX, in the order of the file; one may hold no token."""

    prefix: Path
    ids: np.ndarray  # (tokens,) of the whole file, memory-mapped, in the dtype of the file
    starts: np.ndarray  # (documents + 1,) int64: where each begins in `ids`; the last is their end

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each."""
        return np.diff(self.starts)

    def tokens(self, index: int) -> np.ndarray:
        """The ids of a document, from 0: a view of the file, not a copy."""
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def scan(
        self, tokens: int | None = None, checksum: int = 0, progress: Callable[[float], None] = lambda share: None
    ) -> tuple[int, int]:
        """(the largest of the first `tokens` ids, -1 where there is none; their CRC-32, which goes on from `checksum`).

        Reads them once, a block at a time; `progress` takes the share that is done. Raises DataError for a negative id.
        """
        largest, count = -1, len(self.ids) if tokens is None else tokens
        for start in range(0, count, BLOCK):
            block = self.ids[start : min(start + BLOCK, count)]
            if (smallest := int(block.min())) < 0:
                what = f"token {start + int(block.argmin()):,} is {smallest}, which is no id; make it again"
                raise DataError(f"data: {self.prefix}.bin: {what}")
            largest, checksum = max(largest, int(block.max())), zlib.crc32(block.data, checksum)
            progress(min(1.0, (start + BLOCK) / count))
        return largest, checksum


def read(prefix: str | Path) -> Documents:
    """Open PREFIX, PREFIX.bin or PREFIX.idx. Every number of the index is checked against the two files' sizes before
    it is used; memory for 8 bytes a document is taken, whatever the files' size.

    Raises DataError: a file is missing, torn, of another kind or version, or holds no integers.
    """
    path = without_ending(prefix)
    index_file, ids_file = Path(f"{path}.idx"), Path(f"{path}.bin")
    for file in (ids_file, index_file):
        if not file.is_file():
            raise DataError(
                f"data: no file {file}; Megatron's data are a .bin and a .idx side by side: copy both there"
            )
    with in_one_line(DataError, f"data: {path}.bin and .idx cannot be read", "check their permissions", (OSError,)):
        dtype, sequences, boundaries = _header(index_file, ids_file)
        at = HEADER.size
        lengths = _mapped(index_file, "<i4", at, sequences)
        offsets = _mapped(index_file, "<i8", at + 4 * sequences, sequences)
        firsts = _mapped(index_file, "<i8", at + 12 * sequences, boundaries)
        size = ids_file.stat().st_size
        _check_sequences(index_file, lengths, offsets, dtype.itemsize, size)
        ids = _mapped(ids_file, dtype.str, 0, size // dtype.itemsize)
        return Documents(path, ids, _starts(index_file, firsts, offsets, dtype, len(ids)))


def without_ending(prefix: str | Path) -> Path:
    """PREFIX of PREFIX, PREFIX.bin and PREFIX.idx."""
    text = os.path.expanduser(prefix)
    return Path(text[:-4] if text.endswith((".bin", ".idx")) else text)


def _header(index: Path, ids: Path) -> tuple[np.dtype, int, int]:
    """(dtype of the ids, sequences, boundaries of documents) of an index that is as long as its counts say."""
    with index.open("rb") as file, ids.open("rb") as other:
        beginning, swapped = file.read(HEADER.size), other.read(len(MAGIC)) == MAGIC
    if not beginning.startswith(MAGIC):
        what = "is the .bin, and the .bin is the index: swap them" if swapped else "is no index of Megatron's"
        raise _broken(index, f"{what} (it does not begin with MMIDIDX)")
    if len(beginning) < HEADER.size:
        raise _broken(index, f"ends within its header, after {len(beginning)} bytes")
    _, version, code, sequences, boundaries = HEADER.unpack(beginning)
    if version != VERSION:
        raise _broken(index, f"is of version {version}, only {VERSION} is known")
    if code not in DTYPES:
        raise _broken(index, f"says that its ids are of type {code}, which is none of 1 to 8")
    dtype, size = np.dtype(DTYPES[code]), index.stat().st_size
    if dtype.kind == "f":
        raise DataError(f"data: {ids} holds {dtype.name} numbers, not token ids; name a file of ids")
    needed = HEADER.size + 12 * sequences + 8 * boundaries
    if size == needed + sequences and sequences:
        raise DataError(f"data: {ids} is multimodal: not all of it is text, says its index; name a file of text alone")
    if size != needed or not boundaries:
        counted = f"{sequences:,} sequences and {boundaries:,} boundaries of documents"
        raise _broken(index, f"has {size:,} bytes, but {counted} need {needed:,}")
    return dtype, sequences, boundaries


def _check_sequences(index: Path, lengths: np.ndarray, offsets: np.ndarray, itemsize: int, size: int) -> None:
    """Sequence after sequence they fill the .bin of `size` bytes: no gap, no overlap."""
    end = 0
    for part in _blocks(len(lengths)):
        tokens, at = lengths[part].astype(np.int64), offsets[part]
        if tokens.min() < 0 or at.min() < 0 or at.max() > size:  # so that no sum below overflows
            raise _broken(index, f"says that a sequence from {part.start:,} on lies outside of the .bin")
        ends = at + tokens * itemsize
        wrong = np.flatnonzero(at != np.append(end, ends[:-1]))
        if len(wrong):
            raise _broken(index, f"says that sequence {part.start + wrong[0]:,} is not where the one before it ends")
        end = int(ends[-1])
    if end != size:
        raise _broken(index, f"is of a .bin of {end:,} bytes, and that beside it has {size:,}")


def _starts(index: Path, firsts: np.ndarray, offsets: np.ndarray, dtype: np.dtype, tokens: int) -> np.ndarray:
    """The token that each document begins with, and their end. Documents take every sequence, in order."""
    starts = np.full(len(firsts), tokens, np.int64)
    before, count = 0, len(offsets)
    for part in _blocks(len(firsts)):
        first = np.array(firsts[part])
        if first[0] < before or first[-1] > count or (first[1:] < first[:-1]).any() or (not part.start and first[0]):
            raise _broken(index, f"says that document {part.start:,} or one behind it does not follow the one before")
        inside = first < count  # behind it they begin where the file ends
        starts[part][inside] = offsets[first[inside]] // dtype.itemsize
        before = int(first[-1])
    if before != count:
        raise _broken(index, f"says that its documents end with sequence {before:,}, of {count:,}")
    return starts


def _broken(index: Path, what: str) -> DataError:
    return DataError(f"data: {index} {what}; copy it and its .bin again, or make both again")


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _mapped(file: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    """Read only. No empty part of a file can be mapped."""
    return np.memmap(file, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


class Writer:
    """PREFIX.bin and PREFIX.idx, one document after the other, a document one sequence, as Megatron's own tool makes.

        with Writer("corpus/tl", len(tokenizer)) as file:
            file.add_many(ids, lengths)

    Both are written in a hidden folder beside and renamed at the end, the .idx last: a process that is killed, and an
    error inside of `with`, leave nothing under these names. Lengths go to the disk too: memory does not grow.

    Raises OutputError: a file is there already, or the disk cannot be written.
    """

    documents = tokens = 0

    def __init__(self, prefix: str | Path, vocab_size: int):
        """vocab_size: above every id; it decides how many bytes an id takes."""
        self.prefix, self.vocab_size = without_ending(prefix), vocab_size
        self.code = 8 if vocab_size < SMALL_VOCABULARY else 4
        self._open = ExitStack()
        for file in (self._file("bin"), self._file("idx")):
            if os.path.lexists(file):
                raise OutputError(f"output: {file} is there already; remove it, or choose another name")

    @property
    def bytes_a_token(self) -> int:
        return np.dtype(DTYPES[self.code]).itemsize

    def _file(self, ending: str) -> Path:
        return Path(f"{self.prefix}.{ending}")

    def _writing(self) -> Any:
        fix = "free some room there, or choose another folder"
        return in_one_line(OutputError, f"output: {self.prefix}.bin and .idx cannot be written", fix, (OSError,))

    def __enter__(self) -> "Writer":
        with self._writing():
            folder, name = self.prefix.parent, f".{self.prefix.name[:60]}-"
            beside = tempfile.TemporaryDirectory(dir=folder, prefix=name, ignore_cleanup_errors=True)
            self._folder = Path(self._open.enter_context(beside))
            self._ids = self._open.enter_context((self._folder / "bin").open("wb"))
            self._index = self._open.enter_context((self._folder / "idx").open("w+b"))
            self._index.write(bytes(HEADER.size))  # the counts are known at the end
        return self

    def add(self, ids: np.ndarray) -> None:
        """A document: (tokens,) ids, none too."""
        self.add_many(ids, np.array([len(ids)]))

    def add_many(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Documents end to end: (tokens,) ids, and (documents,) how many of them each has."""
        assert int(lengths.sum()) == len(ids)
        assert not len(lengths) or (lengths.min() >= 0 and lengths.max() <= LONGEST)
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self.vocab_size)
        with self._writing():
            self._ids.write(ids.astype(DTYPES[self.code]).tobytes())
            self._index.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._writing(), self._open:
            if kind is None:
                self._write_index()
                for file in (self._ids, self._index):
                    file.flush()
                    os.fsync(file.fileno())
                for ending in ("bin", "idx"):
                    (self._folder / ending).rename(self._file(ending))

    def _write_index(self) -> None:
        """What comes behind the lengths, and the header."""
        count, itemsize, end = self.documents, np.dtype(DTYPES[self.code]).itemsize, 0
        for part in _blocks(count):
            self._index.seek(HEADER.size + 4 * part.start)
            lengths = np.frombuffer(self._index.read(4 * (part.stop - part.start)), "<i4")
            ends = end + np.cumsum(lengths, dtype=np.int64) * itemsize
            self._index.seek(HEADER.size + 4 * count + 8 * part.start)
            self._index.write((ends - lengths * np.int64(itemsize)).astype("<i8").tobytes())
            end = int(ends[-1])
        self._index.seek(HEADER.size + 12 * count)
        for part in _blocks(count + 1):
            self._index.write(np.arange(part.start, part.stop, dtype="<i8").tobytes())
        self._index.seek(0)
        self._index.write(HEADER.pack(MAGIC, VERSION, self.code, count, count + 1))
