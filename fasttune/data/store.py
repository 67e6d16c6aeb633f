"""Encoded rows on disk: made once for each content (file, template, tokenizer, settings), by all cores, in memory that
does not grow with the data, and read back memory-mapped.

    <cache>/data/<key>/   ids.i32 (tokens) · learned.bool (tokens) · lengths.i32 (rows) · numbers.i64 (rows)
                          manifest.json: CRC of each file, counts; an entry that does not match is made anew
"""

import hashlib
import json
import multiprocessing
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fasttune import system
from fasttune.data.files import Chunk
from fasttune.data.tokenize import Block, Encoder, Recipe
from fasttune.errors import DataError

VERSION = 2  # raise it when the same recipe gives other tokens
ARRAYS = {"ids.i32": np.int32, "learned.bool": np.bool_, "lengths.i32": np.int32, "numbers.i64": np.int64}
MAX_UNUSABLE_SHARE = 0.05
POOL_FROM_CHUNKS = 24  # about 24 MB of JSONL: below, starting workers costs more than they save
CHUNKS_IN_FLIGHT = 2  # per worker
STALLED_S = 600.0  # a chunk (1 MB) takes a second or two

Progress = Callable[[float], None]  # share of the source that is encoded, 0 to 1


@dataclass
class Rows:
    """Encoded rows of one source. ids, learned: (tokens,) on disk; starts: (rows + 1,); numbers: (rows,)."""

    source: str
    ids: np.ndarray
    learned: np.ndarray
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
        """(ids, learned) of a row, both (length,)."""
        inside = slice(self.starts[index], self.starts[index + 1])
        return self.ids[inside], self.learned[inside]


def load(source: str, key: str, recipe: Recipe, chunks: Callable[[], Iterator[Chunk]], progress: Progress) -> Rows:
    """The rows of a source, from the cache or made now. `key` is the hash of its content.

    Raises DataError for a row of a wrong form, for nothing left to learn, and when over MAX_UNUSABLE_SHARE of the rows
    teach nothing (one is shown).
    """
    name = hashlib.sha256(json.dumps([VERSION, key, *astuple(recipe)], default=str).encode()).hexdigest()[:32]
    folder = system.cache_root() / "data" / name
    try:
        return _open(folder, source, check=True)
    except (OSError, ValueError, KeyError, TypeError):
        system.discard_cached(folder, _is_whole)  # torn or changed: never used, made again
    return _open(
        system.cached_folder(f"data/{name}", lambda made: _make(made, source, recipe, chunks(), progress)), source
    )


def _make(folder: Path, source: str, recipe: Recipe, chunks: Iterator[Chunk], progress: Progress) -> None:
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    checks = dict.fromkeys(ARRAYS, 0)
    with ExitStack() as stack:
        out = {name: stack.enter_context((folder / name).open("wb")) for name in ARRAYS}
        for block, done in _encoded(recipe, chunks):
            for name, array in zip(ARRAYS, (block.ids, block.learned, block.lengths, block.numbers), strict=True):
                data = array.tobytes()
                checks[name] = zlib.crc32(data, checks[name])
                out[name].write(data)
            counts.update(block.counts)
            counts["kept"] += len(block.lengths)
            counts["tokens"] += len(block.ids)
            counts["learned"] += int(block.learned.sum())
            examples = block.examples | examples
            progress(done)
    _check_left(source, counts, examples, recipe.max_length)
    (folder / "manifest.json").write_text(json.dumps({"crc32": checks, "counts": counts}), encoding="utf-8")


def _encoded(recipe: Recipe, chunks: Iterator[Chunk]) -> Iterator[tuple[Block, float]]:
    """Blocks in the order of the chunks, whatever the number of workers; few chunks are encoded in this process."""
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
    waiting: deque[tuple[Future[Block], Chunk]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (torch) may hang
    with ProcessPoolExecutor(workers, context, _start_worker, (recipe,)) as pool:
        try:
            for chunk in chain(first, chunks):
                waiting.append((pool.submit(_encode_in_worker, chunk), chunk))
                if len(waiting) > CHUNKS_IN_FLIGHT * workers:
                    yield _answer(*waiting.popleft())
            while waiting:
                yield _answer(*waiting.popleft())
        except BrokenProcessPool as error:
            raise DataError(
                "data: a process that tokenises was ended from outside, most likely for memory: free some and run again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # waits for the chunks in work: no process is left behind


def _answer(future: Future[Block], chunk: Chunk) -> tuple[Block, float]:
    try:
        return future.result(timeout=STALLED_S), chunk.done
    except TimeoutError as error:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise DataError(
            f"data: tokenising stalled: no answer within {STALLED_S:.0f} s for {len(chunk):,} rows of {chunk.source} "
            f"from {chunk.first:,} on; look whether one of them is enormous or the machine out of memory, and run again"
        ) from error


_encoder: Encoder  # of this worker process


def _start_worker(recipe: Recipe) -> None:
    import signal

    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    _encoder = Encoder(recipe)


def _encode_in_worker(chunk: Chunk) -> Block:
    return _encoder.encode(chunk)


def _check_left(source: str, counts: Counter[str], examples: dict[str, str], max_length: int) -> None:
    reasons = {name.removeprefix("dropped: "): n for name, n in counts.items() if name.startswith("dropped: ")}
    unusable = sum(reasons.values())
    if not counts["rows"]:
        raise DataError(f"data: {source} holds no rows")
    if unusable > MAX_UNUSABLE_SHARE * counts["rows"]:
        listed = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))
        worst = max(reasons, key=lambda reason: reasons[reason])
        raise DataError(
            f"data: {unusable:,} of {counts['rows']:,} rows of {source} teach nothing ({listed}): mend or remove them. "
            f"One of them: {examples[worst]!r}"
        )
    if not counts["kept"]:
        raise DataError(
            f"data: no row of {source} is left; all {counts['rows']:,} are longer than model.max_length={max_length}: "
            "raise it, or set data.too_long=truncate"
        )


def _crc32(path: Path) -> int:
    check = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            check = zlib.crc32(block, check)
    return check


def _is_whole(folder: Path) -> bool:
    try:
        _open(folder, "", check=True)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _open(folder: Path, source: str, check: bool = False) -> Rows:
    """An entry; `check` reads every byte. What is not whole raises OSError, ValueError, KeyError or TypeError."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if check and any(_crc32(folder / name) != manifest["crc32"][name] for name in ARRAYS):
        raise ValueError(f"{folder} is not as it was written")
    arrays: dict[str, Any] = {name: np.memmap(folder / name, dtype, mode="r") for name, dtype in ARRAYS.items()}
    checksum = f"{zlib.crc32(json.dumps(manifest['crc32'], sort_keys=True).encode()):08x}"
    starts = np.concatenate([[0], np.cumsum(arrays["lengths.i32"], dtype=np.int64)])
    counts = Counter(manifest["counts"])
    return Rows(source, arrays["ids.i32"], arrays["learned.bool"], starts, arrays["numbers.i64"], counts, checksum)
