"""Large data sets, encoded by a process on each core.

The tokenizer's own threads would not do: a quarter of the work is Python, so that on 16 cores they would give a third
of the speed.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from fasttune.data.sources import Chunk
from fasttune.data.tokenize import Block, Encoder, Recipe
from fasttune.errors import DataError

CHUNKS_IN_FLIGHT = 2  # per worker
STALLED_S = 600.0  # a chunk (1 MB) takes a second or two


def blocks(recipe: Recipe, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Block, float]]:
    """(block, share of the source that is done) in the order of the chunks. Raises DataError."""
    waiting: deque[tuple[Future[Block], Chunk]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads (torch) may hang
    with ProcessPoolExecutor(workers, context, _start_worker, (recipe,)) as pool:
        try:
            for chunk in chunks:
                waiting.append((pool.submit(_encode_in_worker, chunk), chunk))
                if len(waiting) > CHUNKS_IN_FLIGHT * workers:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        except BrokenProcessPool as error:
            raise DataError(
                "data: a process that tokenises was ended from outside, most likely for memory: free some and run again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # waits for the chunks in work: no process is left behind


def _finished(future: Future[Block], chunk: Chunk) -> tuple[Block, float]:
    try:
        return future.result(timeout=STALLED_S), chunk.done
    except TimeoutError as error:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise DataError(
            f"data: tokenising stalled: no answer within {STALLED_S:.0f} s for {len(chunk):,} rows of {chunk.source} "
            f"from {chunk.first:,} on; check whether a row is very large or memory ran out, then run again"
        ) from error


_encoder: Encoder  # of this worker process


def _start_worker(recipe: Recipe) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    _encoder = Encoder(recipe)


def _encode_in_worker(chunk: Chunk) -> Block:
    return _encoder.encode(chunk)
