"""Config and tokenizer → Batches: every data set recognised, encoded (or taken from the cache) and split."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fasttune.config import Config
from fasttune.data import beside, formats, overlap, sources, store, tokenize
from fasttune.data.arithmetic import Part
from fasttune.data.batching import Batches, Encoded
from fasttune.data.files import Chunk
from fasttune.data.formats import Row
from fasttune.data.store import Rows
from fasttune.errors import DataError

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is


def encode(config: Config, tokenizer: Any, packed: bool, progress: Progress) -> Batches:
    """All data sets as steps to train on, from the cache where they are there already. Raises DataError."""
    data = config.data
    parts = [_encode_one(config, source, tokenizer, progress) for source in data.sources]
    batches = Batches(
        parts=parts,
        weights=list(data.sources.values()),
        seed=config.seed,
        eval_share=data.eval_share,
        batch_rows=config.train.batch_rows,
        micro_rows=config.train.micro_batch_rows
        if config.train.micro_batch_rows != "auto"
        else config.train.batch_rows,
        max_length=config.model.max_length,
        packed=packed,
        pad_id=tokenizer.pad_token_id or 0,
    )
    if not batches.rows_per_epoch:
        raise DataError(f"data.eval_share={data.eval_share:g} leaves no row to train on: lower it")
    return batches


def held_out(config: Config, tokenizer: Any, batches: Batches, progress: Progress) -> tuple[list[Encoded], list[str]]:
    """(at most `eval.rows` rows to measure on, spread evenly over those of data.eval_share; what to warn of).

    Of all rows that something is measured on or shown of, those that are trained on too are counted.
    """
    count = config.eval.rows if config.eval.every != "never" else 0
    held: Iterable[Encoded]
    if config.data.eval is not None:
        most = max(count, config.samples, config.eval.problems)
        rows = _encode_one(config, config.data.eval, tokenizer, progress, "test", most) if most else None
        held = [rows.row(i) for i in range(len(rows))] if rows else []
        measured = held[:count]
    else:
        split = zip(batches.parts, batches.split, strict=True)
        places = [(rows, i) for rows, (_, indexes) in split for i in indexes]
        count = min(len(places), count)
        measured = [rows.row(i) for rows, i in (places[at * len(places) // count] for at in range(count))]
        held = (rows.row(i) for rows, i in places)
    found = overlap.warning(batches, held)
    return measured, [found] if found else []


def texts(batches: Batches, held_out: Sequence[Encoded] = ()) -> Iterator[tuple[str, Any]]:
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
) -> Rows:
    data = config.data
    split = data.split if part == "train" else data.held_out_split
    max_rows = max_rows or data.max_rows
    what = f"reading and tokenising {source}"
    progress(what, 0.0)
    form, columns = form_of(config, source, split)
    recipe = tokenize.recipe_of(
        tokenizer,
        form,
        columns,
        data.train_on,
        config.model.max_length,
        data.too_long,
        data.allow_lost,
        data.control_tokens,
    )
    content = sources.fingerprint(source, part, split)

    def chunks() -> Iterator[Chunk]:
        return sources.read(source, part, split, max_rows, data.streaming, data.columns.values())

    rows = store.load(source, f"{content} {max_rows}", recipe, chunks, lambda share: progress(what, share))
    progress(what, 1.0)
    return rows


def form_of(config: Config, source: str, split: str | None = None) -> tuple[str, dict[str, str]]:
    """(format, columns to rename) of a source, by its first row. Raises DataError."""
    data = config.data
    given = data.columns.values()
    for _, place, row in sources.first_rows(source, "train", split or data.split, 1, data.streaming, given):
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
    beside.check(row, place)
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
    return config.model_copy(update={"data": data.model_copy(update={"format": forms.pop()})})


def describe(data: Batches) -> list[str]:
    """One line a data set: what is learned from it, and what was cut, split or dropped and why."""
    found = []
    for rows, weight, (_, held_out) in zip(data.parts, data.weights, data.split, strict=True):
        counts = rows.counts
        mean = counts["tokens"] / len(rows)
        text = f"{rows.source}: {len(rows):,} rows, {counts['tokens']:,} tokens ({mean:.0f} a row), "
        text += f"{counts['learned']:,} learned"
        text += f"; {weight:g} × an epoch" if weight != 1 else ""
        text += f"; {len(held_out):,} held out" if len(held_out) else ""
        for name in sorted(counts):
            if name in ("truncated", "split", "dropped_too_long"):
                text += f"; {counts[name]:,} {name.replace('dropped_too_long', 'dropped: too long')}"
            elif name.startswith(("dropped: ", "lost: ", "control token: ", "only text: ")):
                text += f"; {counts[name]:,} {name}"
        unused = sorted(name.removeprefix("not used: ") for name in counts if name.startswith("not used: "))
        text += f"; not used: {', '.join(unused[:8])}{' …' * (len(unused) > 8)}" if unused else ""
        found.append(text)
    return found
