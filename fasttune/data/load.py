"""Config and tokenizer → Batches: every data set is recognised, encoded (store.py) and split."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fasttune import config as configuration
from fasttune.config import Config
from fasttune.data import formats, sources, store, tokenize
from fasttune.data.arithmetic import Part
from fasttune.data.batching import Batches, Encoded
from fasttune.data.formats import Row
from fasttune.data.sources import Chunk
from fasttune.data.store import Rows
from fasttune.errors import DataError
from fasttune.settings import TOKENS

if TYPE_CHECKING:
    from fasttune.data.duplicates import Copies

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is


def encode(config: Config, tokenizer: Any, packed: bool, progress: Progress) -> Batches:
    """All data sets as steps to train on, from the cache where they are there already. Raises DataError."""
    data, train = config.data, config.train
    settings: dict[str, Any] = {
        "parts": [_encode_one(config, source, tokenizer, progress) for source in data.sources],
        "weights": list(data.sources.values()),
        "seed": config.seed,
        "eval_share": data.eval_share,
        "batch_rows": train.batch_rows,
        "micro_rows": train.batch_rows if train.micro_batch_rows == "auto" else train.micro_batch_rows,
        "max_length": config.model.max_length,
        "packed": packed,
        "pad_id": tokenizer.pad_token_id or 0,
    }
    if data.deduplicate:
        settings["dropped"] = [each.numbers for each in copies(config, tokenizer, settings["parts"], progress)]
    if data.layout == "concat":
        from fasttune.data import corpus

        batches: Batches = corpus.sequences(config, settings, lambda draw: _draw(config, draw, tokenizer, progress))
    else:
        batches = Batches(**settings, group_by_prompt=train.group_by_prompt)
    _check_enough(config, batches)
    return batches


def _check_enough(config: Config, batches: Batches) -> None:
    """Raise DataError where nothing is left to train on."""
    data, sizes = config.data, batches.sizes
    if not any(sizes) and data.eval_share:
        raise DataError(f"data.eval_share={data.eval_share:g} leaves no row to train on: lower it")
    if not any(sizes):
        raise DataError(f"data: no document of {', '.join(data.sources)} has two tokens, so none predicts another")
    if not batches.rows_per_epoch:
        raise DataError("data.train: the weights leave no row to train on: raise them")


def check_held_out(config: Config, found: dict[str, list[Encoded]]) -> None:
    """Raise DataError where a loss on held-out rows was asked for and there are none. Not for a sample of the data."""
    data = config.data
    if config.eval.every == "never" or any(found.values()) or not (data.eval or data.eval_share):
        return
    why = f"data.eval={data.eval} has nothing to predict" if data.eval else f"data.eval_share={data.eval_share:g}"
    fix = "name another" if data.eval else "holds no row out, there are too few: raise it"
    raise DataError(f"{why}{':' * bool(data.eval)} {fix}, or set eval.every=never")


def copies(config: Config, tokenizer: Any, parts: list[Rows], progress: Progress) -> "list[Copies]":
    """Rows of each data set that came before, in it or in an earlier one; by their tokens before any are split."""
    from fasttune.data import duplicates

    if config.data.tokenization != "vanilla":
        parts = [_encode_one(config, source, tokenizer, progress, vanilla=True) for source in config.data.sources]
    return duplicates.of(parts)


def _draw(config: Config, draw: int, tokenizer: Any, progress: Progress) -> list[Rows]:
    """All data sets with their tokens split anew."""
    return [_encode_one(config, source, tokenizer, progress, draw=draw) for source in config.data.sources]


def held_out(
    config: Config, tokenizer: Any, batches: Batches, progress: Progress
) -> tuple[dict[str, list[Encoded]], list[str]]:
    """(source → rows of it to measure on, `eval.rows` at most of all, spread evenly over those of data.eval_share; what
    to warn of).

    Of all rows that something is measured on or shown of, those that are trained on too are counted.
    """
    count = config.eval.rows if config.eval.every != "never" else 0
    if config.data.layout == "concat":
        from fasttune.data import corpus

        def encode_plain(source: str, part: Part, only: np.ndarray | None) -> Rows:
            return _encode_one(config, source, tokenizer, progress, part, vanilla=True, only=only)

        return corpus.held_out(config, batches, count, encode_plain)
    if config.data.eval is not None:
        most = max(count, config.samples, config.eval.problems)
        if not most:
            return {}, []
        rows = _encode_one(config, config.data.eval, tokenizer, progress, "test", most)
        places = [(rows, index) for index in range(len(rows))]
        measured = places[:count]
    else:
        split = zip(batches.parts, batches.split, strict=True)
        places = [(rows, index) for rows, (_, indexes) in split for index in indexes]
        count = min(len(places), count)
        measured = [places[at * len(places) // count] for at in range(count)]
    doubt = overlap(batches, (rows.row(index) for rows, index in places))
    found: dict[str, list[Encoded]] = {}
    for rows, index in measured:
        found.setdefault(rows.source, []).append(rows.row(index))
    return found, [doubt] if doubt else []


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
    """Of a whole row and of its prompt, what comes before its first supervised token; plain text has none: only its
    first token, which nothing predicts."""
    answer = supervised.argmax()
    return hash(ids.tobytes()), hash(b"prompt" + ids[:answer].tobytes()) if answer > 1 else None


def texts(batches: Batches, held_out: Iterable[Encoded] = ()) -> Iterator[tuple[str, Any]]:
    """(where it is from, its ids) of every row."""
    for part in batches.parts:
        for index, number in enumerate(part.numbers):
            yield f"row {number} of {Path(part.source).name}", part.row(index)[0]
    yield from (("a held-out row", ids) for ids, _ in held_out)


def _encode_one(
    config: Config,
    source: str,
    tokenizer: Any,
    progress: Progress,
    part: Part = "train",
    max_rows: int | None = None,
    vanilla: bool = False,
    draw: int = 0,
    only: np.ndarray | None = None,
) -> Rows:
    """The rows of a source. vanilla: with their tokens as they are, also where the config splits some at random, which
    it does anew in each `draw`. only: the numbers of the rows that are wanted, ascending; None: of all."""
    data = config.data
    split = data.split if part == "train" else data.held_out_split
    max_rows = max_rows or data.max_rows
    again = vanilla and data.tokenization != "vanilla"
    what = f"reading and tokenising {source}" + (", to measure with" if again else f", draw {draw + 1}" * bool(draw))
    progress(what, 0.0)
    recipe = _recipe(config, source, split, tokenizer, vanilla or part == "test", draw)
    if recipe is None:
        from fasttune.data import corpus

        apart = not data.cross_document
        rows = corpus.tokenized(source, len(tokenizer), max_rows, apart, lambda share: progress(what, share))
    else:
        key = f"{sources.fingerprint(source, part, split)} {max_rows} {data.documents}"
        key += "" if only is None else f" {zlib.crc32(only.tobytes()):08x} of {len(only)}"

        def chunks() -> Iterator[Chunk]:
            also = data.columns.values()
            found = sources.read(source, part, split, max_rows, data.streaming, also, data.documents)
            return found if only is None else (chunk.only(only) for chunk in found)

        rows = store.stored(source, key, recipe, chunks, lambda share: progress(what, share))
        rows.counts.update(f"not read: {name}" for name in sources.not_read(source))
    progress(what, 1.0)
    return rows


def _recipe(
    config: Config, source: str, split: str, tokenizer: Any, vanilla: bool, draw: int
) -> tokenize.Recipe | None:
    """How a source is encoded; None for one that holds tokens. Raises DataError."""
    data = config.data
    form, columns = form_of(config, source, split)
    settings = data.train_on, config.model.max_length, data.too_long, tuple(data.allow_lost), data.control_tokens
    if data.layout == "rows" and data.tokenization == "vanilla":
        return tokenize.recipe_of(tokenizer, form, columns, *settings)
    from fasttune.data import corpus

    return corpus.recipe_of(config, source, tokenizer, form, columns, settings, vanilla, draw)


def form_of(config: Config, source: str, split: str | None = None) -> tuple[str, dict[str, str]]:
    """(format, columns to rename) of a source, by its first row. Raises DataError."""
    data = config.data
    if source.endswith(TOKENS):
        if data.format not in ("auto", "text"):
            raise DataError(f"data.format={data.format} would be ignored: {source} holds tokens of text; remove it")
        return "text", {}
    also, split = data.columns.values(), split or data.split
    rows = sources.first_rows(source, "train", split, 1, data.streaming, also, documents=data.documents)
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


def tokens_by_source(data: Batches, steps: int) -> dict[str, int]:
    """Tokens of each source in the first `steps` steps, each row by itself; of documents those of whole sequences."""
    lengths = [data.lengths(part) for part in range(len(data.parts))]
    of, each = np.repeat(np.arange(len(lengths)), list(map(len, lengths))), np.concatenate(lengths)
    found = np.zeros(len(lengths))
    for epoch in range(-(-steps // data.steps_per_epoch)):
        rows = data.order(epoch)[: (steps - epoch * data.steps_per_epoch) * data.batch_rows]
        found += np.bincount(of[rows], each[rows], len(lengths))
    return {part.source: int(tokens) for part, tokens in zip(data.parts, found, strict=True)}


def nothing_split(data: Batches) -> list[str]:
    """A warning where data.tokenization has changed nothing."""
    total = sum((part.counts for part in data.parts), Counter[str]())
    before, after, splits = (total[f"tokenization: {name}"] for name in ("tokens before", "tokens after", "splits"))
    if not before or splits or before != after:
        return []
    return ["data.tokenization has split no token (a tokenizer of bytes has nothing to split): it is as with vanilla"]


def describe(data: Batches) -> list[str]:
    """One line a data set: what is trained on of it, and what was cut, split or dropped and why."""
    found = []
    dropped = data.dropped or [np.zeros(0)] * len(data.parts)
    for rows, weight, (_, held_out), copied in zip(data.parts, data.weights, data.split, dropped, strict=True):
        counts, tokens = rows.counts, rows.counts["tokens"]
        each = data.unit.removesuffix("s")
        kept = counts["kept"]
        parts = [f"{rows.source}: {kept:,} {data.unit}, {tokens:,} tokens ({tokens / max(1, kept):.0f} a {each})"]
        parts[0] += f", {counts['supervised']:,} supervised" if data.unit == "rows" else ""
        parts += [f"{weight:g} × an epoch"] if weight != 1 else []
        parts += [f"{len(copied):,} left out, copies of earlier ones (data.deduplicate)"] if len(copied) else []
        parts += [f"{len(held_out):,} held out"] if len(held_out) else []
        parts += [
            f"{counts[name]:,} {name.replace('dropped_too_long', 'dropped: too long')}"
            for name in sorted(counts)
            if name.startswith(("truncated", "split", "dropped", "lost: ", "control token: ", "only text: "))
        ]
        if before := counts["tokenization: tokens before"]:
            after = counts["tokenization: tokens after"]
            parts.append(f"tokens split at random: {before:,} → {after:,} ({after / before:.3f} ×)")
        for kind in ("not used: ", "not read: "):
            names = sorted(name.removeprefix(kind) for name in counts if name.startswith(kind))
            parts += [f"{kind}{', '.join(names[:8])}{' …' * (len(names) > 8)}"] if names else []
        found.append("; ".join(parts))
    if data.unit == "documents":
        many = f"{data.rows_per_epoch:,} sequences of {data.max_length:,} tokens an epoch"
        found.append(f"documents end to end: {many}, shuffled anew in each")
    if data.group_by_prompt:
        all_rows, prompts = len(data.prompts), len(set(data.prompts.tolist()))
        found.append(
            f"train.group_by_prompt: the {all_rows:,} rows have {prompts:,} prompts, those of one come in one step"
            if prompts < all_rows
            else "train.group_by_prompt changes nothing: each row has a prompt of its own"
        )
    return found
