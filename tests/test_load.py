"""Encoded rows on disk: made once for each content, never used when torn, the same from any number of processes."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fasttune import system
from fasttune.data import arithmetic, files, sources, store, workers
from fasttune.data.sources import Chunk
from fasttune.data.store import Rows
from fasttune.data.tokenize import Recipe
from fasttune.errors import DataError, FasttuneError

GOOD = {"question": "q", "answer": "a"}
EMPTY = {"question": "an empty one", "answer": ""}


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return replace(tiny_recipe, form="question_answer")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every chunk that is encoded in this process."""
    seen: list[int] = []
    encode = store.Encoder.encode

    def counting(self: Any, chunk: Chunk) -> Any:
        seen.append(len(chunk))
        return encode(self, chunk)

    monkeypatch.setattr(store.Encoder, "encode", counting)
    return seen


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stored(recipe: Recipe, source: str) -> Rows:
    key = sources.fingerprint(source, "train", "train")
    return store.stored(source, key, recipe, lambda: sources.read(source, "train"), lambda share: None)


def contents(rows: Rows) -> tuple[list[int], ...]:
    return tuple(array.tolist() for array in (rows.ids, rows.supervised, rows.starts, rows.numbers))


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_rows_come_back_as_they_were_encoded(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    rows = arithmetic.generate("train", rows=50)
    source = write(tmp_path / "rows.jsonl", [*rows[:20], EMPTY, *rows[20:]])
    found = stored(recipe, source)
    block = store.Encoder(recipe).encode(Chunk(source, 1, 1.0, rows=[*rows[:20], EMPTY, *rows[20:]]))
    assert len(found) == 50
    assert found.lengths.tolist() == block.lengths.tolist()
    assert (found.ids.tolist(), found.supervised.tolist()) == (block.ids.tolist(), block.supervised.tolist())
    assert found.numbers.tolist() == [*range(1, 21), *range(22, 52)]
    start = int(block.lengths[:3].sum())
    ids, learned = found.row(3)
    assert (ids == block.ids[start : start + block.lengths[3]]).all()
    assert (learned == block.supervised[start : start + block.lengths[3]]).all()
    assert found.counts == {
        "rows": 51,
        "kept": 50,
        "tokens": len(block.ids),
        "supervised": int(block.supervised.sum()),
        "dropped: empty answer": 1,
    }


def test_the_second_time_nothing_is_encoded(tmp_path: Path, cache: Path, recipe: Recipe, encoded: list[int]) -> None:
    source = write(tmp_path / "rows.jsonl", arithmetic.generate("train", rows=50))
    first = stored(recipe, source)
    assert sum(encoded) == 50
    encoded.clear()
    second = stored(recipe, write(tmp_path / "copy.jsonl", arithmetic.generate("train", rows=50)))
    assert encoded == []
    assert contents(first) == contents(second)
    assert (second.counts, second.source) == (first.counts, str(tmp_path / "copy.jsonl"))
    assert len(entries(cache)) == 1


CHANGES: list[Callable[[Recipe], Recipe]] = [
    lambda r: replace(r, train_on="all"),
    lambda r: replace(r, max_length=r.max_length - 1),
    lambda r: replace(r, too_long="split"),
    lambda r: replace(r, template=replace(r.template, source="{# #}" + r.template.source)),
    lambda r: replace(r, template=replace(r.template, special={**r.template.special, "eos_token": "x"})),
    lambda r: replace(r, columns=(("question", "question"),)),
    lambda r: replace(r, tokenizer_json=r.tokenizer_json + " "),
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_makes_another_entry(
    tmp_path: Path, cache: Path, recipe: Recipe, encoded: list[int], change: Callable[[Recipe], Recipe]
) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD] * 3)
    stored(recipe, source)
    stored(change(recipe), source)
    assert len(entries(cache)) == 2
    assert sum(encoded) == 6


def test_a_changed_file_makes_another_entry(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    stored(recipe, write(tmp_path / "rows.jsonl", [GOOD] * 3))
    assert len(stored(recipe, write(tmp_path / "rows.jsonl", [GOOD] * 4))) == 4
    assert len(entries(cache)) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("name", [*store.ARRAYS, "manifest.json"])
@pytest.mark.parametrize("tear", [flip, shorten, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_torn_entry_is_made_again(
    tmp_path: Path, cache: Path, recipe: Recipe, encoded: list[int], name: str, tear: Callable[[Path], None]
) -> None:
    source = write(tmp_path / "rows.jsonl", arithmetic.generate("train", rows=20))
    whole = contents(stored(recipe, source))
    (entry,) = entries(cache)
    tear(cache / entry / name)
    encoded.clear()
    assert contents(stored(recipe, source)) == whole
    if not (name == "manifest.json" and tear is flip):  # a bit of the name of the source may flip: nothing is torn
        assert sum(encoded) == 20
    encoded.clear()
    stored(recipe, source)
    assert encoded == []


def test_a_failed_build_leaves_nothing(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD] * 5000)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"question": "cut o')
    with pytest.raises(DataError, match="line 5001 is no valid JSON"):
        stored(recipe, source)
    assert entries(cache) == []


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD] * 5)

    def interrupted() -> Iterator[Chunk]:
        yield from sources.read(source, "train")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stored(source, "key", recipe, interrupted, lambda share: None)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", [GOOD])
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTTUNE_CACHE", str(tmp_path / "file" / "cache"))  # root may write anywhere else
    with pytest.raises(FasttuneError, match="^cache: .*/file/cache cannot be written .*FASTTUNE_CACHE"):
        stored(recipe, source)
    monkeypatch.setenv("FASTTUNE_CACHE", "~no-such-user/cache")
    with pytest.raises(FasttuneError, match="^cache: .*FASTTUNE_CACHE"):
        stored(recipe, source)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("I/O error: full (os error 28)")])
def test_a_full_cache_is_one_line_and_leaves_nothing(cache: Path, error: Exception) -> None:
    def full(made: Path) -> None:
        raise error

    with pytest.raises(FasttuneError, match="^cache: .* cannot be written .*; free some room there"):
        system.cached_folder("data/x", full)
    assert not list(cache.iterdir())


def test_what_a_killed_build_left_is_swept_after_a_day(cache: Path) -> None:
    for name, age_s in ((".x-old", 25 * 3600), (".x-at-work", 3600)):
        made = cache / name / "made"
        made.mkdir(parents=True)
        for path in (made, made.parent):
            os.utime(path, (time.time() - age_s,) * 2)
    system.cached_folder("data/y", lambda made: None)
    assert sorted(path.name for path in cache.iterdir()) == [".x-at-work", "y"]


def test_an_entry_that_another_process_has_made_again_stays(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    """Both found it torn: what the first one has put there, and is reading, is not removed by the second one."""
    stored(recipe, write(tmp_path / "rows.jsonl", [GOOD]))
    (entry,) = cache.iterdir()
    system.discard_cached(entry, lambda found: store._open(found, "") is not None)
    assert store._open(entry, "") and list(cache.iterdir()) == [entry]
    (entry / "ids.i32").write_bytes(b"torn")
    system.discard_cached(entry, lambda found: store._open(found, "") is not None)
    assert not list(cache.iterdir())


def test_over_5_percent_of_useless_rows_is_an_error_that_shows_one(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    assert len(stored(recipe, write(tmp_path / "few.jsonl", [GOOD] * 95 + [EMPTY] * 5))) == 95
    source = write(tmp_path / "many.jsonl", [GOOD] * 94 + [EMPTY] * 5 + [{"question": "", "answer": "a"}])
    told = r"6 of 100 rows of .*many.jsonl teach nothing \(5 empty answer, 1 empty question\).*an empty one"
    with pytest.raises(DataError, match=told) as caught:
        stored(recipe, source)
    assert "\n" not in str(caught.value)
    assert len(entries(cache)) == 1


def test_nothing_left_is_an_error(tmp_path: Path, cache: Path, recipe: Recipe) -> None:
    with pytest.raises(DataError, match="blank.jsonl holds no rows"):
        stored(recipe, _blank(tmp_path))
    source = write(tmp_path / "long.jsonl", [{"question": "q" * 600, "answer": "a"}] * 3)
    with pytest.raises(DataError, match=r"all 3 are longer than model.max_length=512: raise it, or set data.too_long"):
        stored(replace(recipe, too_long="drop"), source)
    assert entries(cache) == []


def _blank(tmp_path: Path) -> str:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    return str(tmp_path / "blank.jsonl")


def test_progress_rises_to_the_end(
    tmp_path: Path, cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 4000)
    source = write(tmp_path / "rows.jsonl", arithmetic.generate("train", rows=200))
    shares: list[float] = []
    store.stored(source, "key", recipe, lambda: sources.read(source, "train"), shares.append)
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_workers_give_the_same_bytes_as_one_process(
    tmp_path: Path, cache: Path, recipe: Recipe, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 4000)
    source = write(tmp_path / "rows.jsonl", [*arithmetic.generate("train", rows=300), EMPTY])
    alone = contents(stored(recipe, source))
    assert sum(encoded) == 301
    encoded.clear()
    monkeypatch.setenv("FASTTUNE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(store, "POOL_FROM_CHUNKS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert contents(stored(recipe, source)) == alone
    assert encoded == []  # not here
    bad = write(tmp_path / "bad.jsonl", [*arithmetic.generate("train", rows=300), {"question": 3, "answer": "a"}])
    with pytest.raises(DataError, match="bad.jsonl line 301: question is int 3"):
        stored(recipe, bad)
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_a_clear_error(
    tmp_path: Path, cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "POOL_FROM_CHUNKS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def chunks() -> Iterator[Chunk]:
        for number in range(1, 60):
            for child in multiprocessing.active_children():
                assert child.pid is not None
                with contextlib.suppress(ProcessLookupError):  # it may be gone by now
                    os.kill(child.pid, signal.SIGKILL)
            yield Chunk("rows.jsonl", number, 0.5, rows=[GOOD])

    with pytest.raises(DataError, match="ended from outside, most likely for memory"):
        store.stored("rows.jsonl", "key", recipe, chunks, lambda share: None)
    assert entries(cache) == []
    assert multiprocessing.active_children() == []


def test_a_stalled_worker_is_named_and_leaves_no_process(
    tmp_path: Path, cache: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "POOL_FROM_CHUNKS", 2)
    monkeypatch.setattr(workers, "STALLED_S", 1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def chunks() -> Iterator[Chunk]:
        for number in range(1, 60):
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGSTOP)
            yield Chunk("rows.jsonl", number, 0.5, rows=[GOOD])

    with pytest.raises(DataError, match="stalled: no answer within 1 s for 1 rows of rows.jsonl from 1 on"):
        store.stored("rows.jsonl", "key", recipe, chunks, lambda share: None)
    assert entries(cache) == []
    assert multiprocessing.active_children() == []
