"""Config and tokenizer → Batches: every data set is recognised, encoded and split.

Tokens are made once for each content (file, template, tokenizer, settings), in memory that does not grow with the data:

    <cache>/data/<key>/   ids.i32 (tokens) · learned.bool (tokens: whether supervised) · lengths.i32 (rows)
                          numbers.i64 (rows) · manifest.json: CRC of each file, counts
"""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fasttune import config as configuration, system
from fasttune.config import Config
from fasttune.data import formats, sources, tokenize
from fasttune.data.arithmetic import Part
from fasttune.data.batching import Batches, Encoded
from fasttune.data.formats import Row
from fasttune.data.sources import Chunk
from fasttune.data.tokenize import Block, Encoder, Recipe, Rows
from fasttune.errors import DataError

VERSION = 3  # raise it when the same recipe gives other tokens or counts
ARRAYS = {"ids.i32": np.int32, "learned.bool": np.bool_, "lengths.i32": np.int32, "numbers.i64": np.int64}
MAX_UNUSABLE_SHARE = 0.05
POOL_FROM_CHUNKS = 24  # about 24 MB of JSONL: below, starting workers costs more than they save

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is


def encode(config: Config, tokenizer: Any, packed: bool, progress: Progress) -> Batches:
    """All data sets as steps to train on, from the cache where they are there already. Raises DataError."""
    data, train = config.data, config.train
    batches = Batches(
        parts=[_encode_one(config, source, tokenizer, progress) for source in data.sources],
        weights=list(data.sources.values()),
        seed=config.seed,
        eval_share=data.eval_share,
        batch_rows=train.batch_rows,
        micro_rows=train.batch_rows if train.micro_batch_rows == "auto" else train.micro_batch_rows,
        max_length=config.model.max_length,
        packed=packed,
        pad_id=tokenizer.pad_token_id or 0,
        group_by_prompt=train.group_by_prompt,
    )
    if not batches.rows_per_epoch:
        raise DataError(f"data.eval_share={data.eval_share:g} leaves no row to train on: lower it")
    return batches


def held_out(config: Config, tokenizer: Any, batches: Batches, progress: Progress) -> tuple[list[Encoded], list[str]]:
    """(at most `eval.rows` rows to measure on, spread evenly over those of data.eval_share; what to warn of).

    Of all rows that something is measured on or shown of, those that are trained on too are counted.
    """
    count = config.eval.rows if config.eval.every != "never" else 0
    if config.data.eval is not None:
        most = max(count, config.samples, config.eval.problems)
        if not most:
            return [], []
        rows = _encode_one(config, config.data.eval, tokenizer, progress, "test", most)
        places = [(rows, index) for index in range(len(rows))]
        measured = places[:count]
    else:
        split = zip(batches.parts, batches.split, strict=True)
        places = [(rows, index) for rows, (_, indexes) in split for index in indexes]
        count = min(len(places), count)
        measured = [places[at * len(places) // count] for at in range(count)]
    doubt = overlap(batches, (rows.row(index) for rows, index in places))
    return [rows.row(index) for rows, index in measured], [doubt] if doubt else []


def overlap(batches: Batches, held_out: Iterable[Encoded]) -> str | None:
    """How many of the held-out rows have their prompt, and how many prompt and answer too, among the rows that are
    trained on; None if none. Compared are tokens, so the form of the files does not matter, nor what was cut off.
    """
    held = [_hashes(*row) for row in held_out]
    wanted = {key for keys in held for key in keys} - {None}
    seen = set[int | None]()
    for rows, (trained, _) in zip(batches.parts, batches.split, strict=True) if wanted else ():
        ids, supervised = np.asarray(rows.ids), np.asarray(rows.supervised)  # a slice of a memory map takes longer
        for start, end in zip(rows.starts[trained], rows.starts[trained + 1], strict=True):
            seen.update(key for key in _hashes(ids[start:end], supervised[start:end]) if key in wanted)
    same = sum(whole in seen for whole, _ in held)
    asked = sum(not seen.isdisjoint(keys) for keys in held)
    if not asked:
        return None
    return (
        f"of {len(held):,} held-out rows {asked:,} have a prompt that is trained on, {same:,} of them with the "
        "same answer: what is measured on them says little about new rows; remove them from one of the two"
    )


def _hashes(ids: np.ndarray, supervised: np.ndarray) -> tuple[int, int | None]:
    """Of a whole row and of its prompt, what comes before its first supervised token; plain text has none."""
    answer = supervised.argmax()
    return hash(ids.tobytes()), hash(b"prompt" + ids[:answer].tobytes()) if answer else None


def texts(batches: Batches, held_out: Sequence[Encoded] = ()) -> Iterator[tuple[str, Any]]:
    """(where it is from, its ids) of every row."""
    for part in batches.parts:
        for index, number in enumerate(part.numbers):
            yield f"row {number} of {Path(part.source).name}", part.row(index)[0]
    yield from (("a held-out row", ids) for ids, _ in held_out)


def _encode_one(
    config: Config, source: str, tokenizer: Any, progress: Progress, part: Part = "train", max_rows: int | None = None
) -> Rows:
    data = config.data
    split = data.split if part == "train" else data.held_out_split
    max_rows = max_rows or data.max_rows
    what = f"reading and tokenising {source}"
    progress(what, 0.0)
    form, columns = form_of(config, source, split)
    settings = data.train_on, config.model.max_length, data.too_long, tuple(data.allow_lost), data.control_tokens
    recipe = tokenize.recipe_of(tokenizer, form, columns, *settings)
    key = f"{sources.fingerprint(source, part, split)} {max_rows}"

    def chunks() -> Iterator[Chunk]:
        return sources.read(source, part, split, max_rows, data.streaming, data.columns.values())

    rows = stored(source, key, recipe, chunks, lambda share: progress(what, share))
    progress(what, 1.0)
    return rows


def form_of(config: Config, source: str, split: str | None = None) -> tuple[str, dict[str, str]]:
    """(format, columns to rename) of a source, by its first row. Raises DataError."""
    data = config.data
    rows = sources.first_rows(source, "train", split or data.split, 1, data.streaming, data.columns.values())
    for _, place, row in rows:
        return form_by(config, source, row, place)
    raise DataError(f"data: {source} holds no rows")


def form_by(config: Config, source: str, row: Row, place: str) -> tuple[str, dict[str, str]]:
    """(format, columns to rename) of a source, by a row of it. Raises DataError.

    data.format and data.columns are of what is trained on. Of several sources, and for the held-out rows, each has its
    own: one whose rows do not have the columns that were named is recognised as it is.
    """
    data = config.data
    columns = data.columns if list(data.sources) == [source] else formats.applying(data.columns, row)
    row = formats.rename(row, columns, place)
    formats.check_row(row, place)
    own = data.format != "auto" and all(column in row for column in formats.COLUMNS[data.format])
    if own or (data.format != "auto" and source in data.sources):
        return data.format, columns
    return formats.detect(row, place), columns


def with_format(config: Config) -> Config:
    """The config with the recognised format written out, where all data sets have the same one."""
    data = config.data
    forms = {form_of(config, source)[0] for source in data.sources}
    forms |= {form_of(config, data.eval, data.held_out_split)[0]} if data.eval else set()
    if len(forms) > 1:
        return config
    return configuration.changed(config, data={"format": forms.pop()})


def describe(data: Batches) -> list[str]:
    """One line a data set: what is trained on of it, and what was cut, split or dropped and why."""
    found = []
    for rows, weight, (_, held_out) in zip(data.parts, data.weights, data.split, strict=True):
        counts, tokens = rows.counts, rows.counts["tokens"]
        parts = [f"{rows.source}: {len(rows):,} rows, {tokens:,} tokens ({tokens / len(rows):.0f} a row)"]
        parts[0] += f", {counts['supervised']:,} supervised"
        parts += [f"{weight:g} × an epoch"] if weight != 1 else []
        parts += [f"{len(held_out):,} held out"] if len(held_out) else []
        parts += [
            f"{counts[name]:,} {name.replace('dropped_too_long', 'dropped: too long')}"
            for name in sorted(counts)
            if name.startswith(("truncated", "split", "dropped", "lost: ", "control token: ", "only text: "))
        ]
        unused = sorted(name.removeprefix("not used: ") for name in counts if name.startswith("not used: "))
        parts += [f"not used: {', '.join(unused[:8])}{' …' * (len(unused) > 8)}"] if unused else []
        found.append("; ".join(parts))
    if data.group_by_prompt:
        all_rows, prompts = len(data.prompts), len(set(data.prompts.tolist()))
        found.append(
            f"train.group_by_prompt: the {all_rows:,} rows have {prompts:,} prompts, those of one come in one step"
            if prompts < all_rows
            else "train.group_by_prompt changes nothing: each row has a prompt of its own"
        )
    return found


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
    made = _open(
        system.cached_folder(f"data/{name}", lambda made: _make(made, source, recipe, chunks(), progress)), source
    )
    assert made is not None
    return made


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


def _make(
    folder: Path, source: str, recipe: Recipe, chunks: Iterator[Chunk], progress: Callable[[float], None]
) -> None:
    counts, examples, checks = Counter[str](), dict[str, str](), dict.fromkeys(ARRAYS, 0)
    with ExitStack() as stack:
        out = {name: stack.enter_context((folder / name).open("wb")) for name in ARRAYS}
        for block, done in _blocks(recipe, chunks):
            for name, each in zip(ARRAYS, (block.ids, block.supervised, block.lengths, block.numbers), strict=True):
                data = each.tobytes()
                checks[name] = zlib.crc32(data, checks[name])
                out[name].write(data)
            counts.update(block.counts)
            counts["kept"] += len(block.lengths)
            counts["tokens"] += len(block.ids)
            counts["supervised"] += int(block.supervised.sum())
            examples = block.examples | examples
            progress(done)
    _check_enough_left(source, counts, examples, recipe.max_length)
    (folder / "manifest.json").write_text(json.dumps({"crc32": checks, "counts": counts}), encoding="utf-8")


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
