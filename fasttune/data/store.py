"""Encoded rows, made once for each content (file, template, tokenizer, settings), in memory that does not grow:

    <cache>/data/<key>/   ids.i32 (tokens) · learned.bool (tokens: whether supervised) · lengths.i32 (rows)
                          numbers.i64 (rows) · manifest.json: CRC of each file, counts

What a process that was killed has encoded of a large source is taken up by the next one that wants it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fasttune import report, system
from fasttune.data.sources import Chunk
from fasttune.data.tokenize import Block, Encoder, Recipe
from fasttune.errors import DataError

VERSION = 3  # raise it when the same recipe gives other tokens or counts
ARRAYS = {"ids.i32": np.int32, "learned.bool": np.bool_, "lengths.i32": np.int32, "numbers.i64": np.int64}
SAVED = "saved.json"  # of what is not whole yet
SAVE_CHUNKS = 64  # of about 1 MB: what a killed process loses of its work
MAX_UNUSABLE_SHARE = 0.05
POOL_FROM_CHUNKS = 24  # about 24 MB of JSONL: below, starting workers costs more than they save


@dataclass
class Rows:
    """Encoded rows of one source. ids, supervised: (tokens,) on disk; starts: (rows + 1,); numbers: (rows,).

    supervised: None where every token is.
    """

    source: str
    ids: np.ndarray
    supervised: np.ndarray | None
    starts: np.ndarray
    numbers: np.ndarray
    counts: Counter[str]
    checksum: str = ""  # of all arrays: the same rows have the same

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: (rows,)."""
        return np.diff(self.starts)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, supervised) of a row, both (length,)."""
        inside = slice(self.starts[index], self.starts[index + 1])
        ids = self.ids[inside]
        return ids, np.ones(len(ids), np.bool_) if self.supervised is None else self.supervised[inside]


def stored(
    source: str, key: str, recipe: Recipe, chunks: Callable[[], Iterator[Chunk]], progress: Callable[[float], None]
) -> Rows:
    """The rows of a source, from the cache or made now. `key` is the hash of its content; `progress` takes the share of
    it that is encoded, 0 to 1.

    Raises DataError for a row of a wrong form, for no row left, and when over MAX_UNUSABLE_SHARE of the rows teach
    nothing (one is shown).
    """
    name = hashlib.sha256(json.dumps([VERSION, key, *astuple(recipe)], default=str).encode()).hexdigest()[:32]
    folder = system.cache_root() / "data" / name
    if rows := _open(folder, source):
        return rows
    system.discard_cached(
        folder, lambda found: _open(found, source) is not None
    )  # torn or changed: never used, made again

    def build(made: Path) -> None:
        with _unfinished(folder.with_name(f".{name}-unfinished")) as work:
            _make(work or made, source, recipe, chunks(), progress)
            if work:
                for file in (*ARRAYS, "manifest.json"):
                    (work / file).rename(made / file)

    whole = _open(system.cached_folder(f"data/{name}", build), source)
    assert whole is not None
    return whole


def _open(folder: Path, source: str) -> Rows | None:
    """An entry of the cache, every byte of it checked; None where it is not there or not whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files: list[Any] = [np.memmap(folder / name, dtype, mode="r") for name, dtype in ARRAYS.items()]
        if any(zlib.crc32(file) != manifest["crc32"][name] for name, file in zip(ARRAYS, files, strict=True)):
            return None
        ids, supervised, lengths, numbers = files
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        checksum = f"{zlib.crc32(json.dumps(manifest['crc32'], sort_keys=True).encode()):08x}"
        return Rows(source, ids, supervised, starts, numbers, Counter(manifest["counts"]), checksum)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _unfinished(work: Path) -> Iterator[Path | None]:
    """The folder of what is encoded of a source, for this process alone; None where another one is at it.

    It stays where a process was ended; a source that is refused leaves nothing.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        done = True
        try:
            yield work
        except Exception:
            raise
        except BaseException:  # from outside: Ctrl-C
            done = not (work / SAVED).exists()
            raise
        finally:
            if done:
                shutil.rmtree(work, ignore_errors=True)


def _make(
    folder: Path, source: str, recipe: Recipe, chunks: Iterator[Chunk], progress: Callable[[float], None]
) -> None:
    """All files of an entry, from where the last one who tried has saved them."""
    saved = _saved(folder)
    counts, examples, checks = Counter(saved["counts"]), dict(saved["examples"]), saved["crc32"]
    with ExitStack() as stack:
        out = {name: stack.enter_context((folder / name).open("ab")) for name in ARRAYS}
        for name, file in out.items():
            file.truncate(saved["bytes"][name])
        blocks = _blocks(recipe, islice(chunks, saved["chunks"], None))
        for number, (block, done) in enumerate(blocks, saved["chunks"] + 1):
            for name, each in zip(ARRAYS, (block.ids, block.supervised, block.lengths, block.numbers), strict=True):
                data = each.tobytes()
                checks[name] = zlib.crc32(data, checks[name])
                out[name].write(data)
            counts.update(block.counts)
            counts["kept"] += len(block.lengths)
            counts["tokens"] += len(block.ids)
            counts["supervised"] += int(block.supervised.sum())
            examples = block.examples | examples
            if number % SAVE_CHUNKS == 0:
                for file in out.values():
                    file.flush()
                    os.fsync(file.fileno())
                sizes = {name: file.tell() for name, file in out.items()}
                state = {"chunks": number, "bytes": sizes, "crc32": checks, "counts": counts, "examples": examples}
                report.write_json(folder / SAVED, state)
            progress(done)
    _check_enough_left(source, counts, examples, recipe.max_length)
    (folder / SAVED).unlink(missing_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"crc32": checks, "counts": counts}), encoding="utf-8")


def _saved(folder: Path) -> dict[str, Any]:
    """How far an earlier process came: chunks that are encoded, and the bytes of each file that belong to them."""
    try:
        return dict(json.loads((folder / SAVED).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        zero = dict.fromkeys(ARRAYS, 0)
        return {"chunks": 0, "bytes": zero, "crc32": dict(zero), "counts": {}, "examples": {}}


def _check_enough_left(source: str, counts: Counter[str], examples: dict[str, str], max_length: int) -> None:
    reasons = {name.removeprefix("dropped: "): n for name, n in counts.items() if name.startswith("dropped: ")}
    unusable = sum(reasons.values())
    if not counts["rows"]:
        raise DataError(f"data: {source} holds no rows")
    if unusable > MAX_UNUSABLE_SHARE * counts["rows"]:
        listed = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))
        worst = max(reasons, key=lambda reason: reasons[reason])
        raise DataError(
            f"data: {unusable:,} of {counts['rows']:,} rows of {source} teach nothing ({listed}): fix or remove them. "
            f"One of them: {examples[worst]!r}"
        )
    if not counts["kept"]:
        raise DataError(
            f"data: no row of {source} is left; all {counts['rows']:,} are longer than model.max_length={max_length}: "
            "raise it, or set data.too_long=truncate"
        )


def _blocks(recipe: Recipe, chunks: Iterator[Chunk]) -> Iterator[tuple[Block, float]]:
    """(block, share of the source that is done) in the order of the chunks; few are encoded in this process."""
    first = list(islice(chunks, POOL_FROM_CHUNKS))
    workers = len(os.sched_getaffinity(0))
    if len(first) < POOL_FROM_CHUNKS or workers == 1:
        encoder = Encoder(recipe)
        for chunk in chain(first, chunks):
            os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the tokenizer's own threads, and only for this
            block = encoder.encode(chunk)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            yield block, chunk.done
        return
    from fasttune.data import workers as pool

    yield from pool.blocks(recipe, chain(first, chunks), workers)
