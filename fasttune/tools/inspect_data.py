"""`fasttune data`: the rows of a config as they will be trained, as figures. Loads no weights.

    figures = look(config.load("configs/quickstart.yaml"), rows=3, reporter=terminal.Reporter())
    data_page.show(figures)

--json prints every field of DataFigures by its name. `learned_tokens` are the supervised ones, where the loss is taken:
never the first token of a row, which nothing predicts.
"""

import math
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from fasttune import hardware, terminal
from fasttune.config import Config
from fasttune.core import autoconfig, prepare, pretrained
from fasttune.core.memory import Shape
from fasttune.data import chat, load
from fasttune.data.batching import Batches
from fasttune.data.duplicates import Copies
from fasttune.data.sequences import FEWEST
from fasttune.data.store import Rows
from fasttune.data.tokenize import IGNORE, labels
from fasttune.system import library_log
from fasttune.tools import inspect_tokens
from fasttune.tools.estimate import lay_out
from fasttune.tools.inspect_tokens import Tokenization

BARS = 7  # of the histogram, and one for the longest rows where they are far out


@dataclass(frozen=True)
class DataSet:
    """What became of one source. Rows are kept as trained: a row that was split counts as its pieces."""

    source: str
    weight: float  # how often a row is seen in an epoch
    rows_read: int
    rows_kept: int
    rows_held_out: int  # of the kept ones, by data.eval_share
    rows_truncated: int  # longer than max_length_tokens: its beginning is trained
    rows_split: int  # longer: trained in pieces
    rows_too_long: int  # longer: dropped
    rows_dropped: dict[str, int]  # reason → rows that teach nothing
    rows_with_unused: dict[str, int]  # what is not used (column id, from of a turn) or is only text (<image>) → rows
    rows_lost: dict[str, int]  # what the chat template leaves out → rows
    rows_with_control_tokens: dict[str, int]  # token → rows that have it in what a turn says
    files_not_read: list[str]  # of a folder, for their endings
    tokens: int  # of the kept rows
    learned_tokens: int
    rows_again: int  # prompt and answer of an earlier row, of this source or one before it
    rows_again_elsewhere: int  # of these, those that came first in another source
    prompts_again: int  # rows with the prompt of an earlier one, whatever the answer
    prompts_again_elsewhere: int
    rows_deduplicated: int  # of rows_again, left out by data.deduplicate


@dataclass(frozen=True)
class Bin:
    """Rows of a length from `from_tokens` to `to_tokens`, both included."""

    from_tokens: int
    to_tokens: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """Tokens a kept row has, over all data sets."""

    shortest_tokens: int
    median_tokens: float
    mean_tokens: float
    p95_tokens: float
    longest_tokens: int
    histogram: list[Bin]


@dataclass(frozen=True)
class PaddedShare:
    """Share of the computed positions that hold no token, over the first `steps` steps of the run, in either layout.

    tokens: of the rows of these steps; computed_tokens: those of packs as a run here lays them out.
    grouped_share: of the tokens of as many steps with train.group_by_prompt, those that would be computed.
    """

    steps: int
    rows_at_once: int  # of a padded micro-batch; of a pack: how many rows of max_length_tokens fit
    padded_share: float
    packed_share: float
    tokens: int
    computed_tokens: int
    grouped_share: float


@dataclass(frozen=True)
class Row:
    """One row as it is trained. number: its line of a JSONL file, else its row. pieces: (text, learned), in order."""

    source: str
    number: int
    tokens: int
    learned_tokens: int
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class DataFigures:
    """Everything the page shows. *_share: 0 to 1."""

    name: str
    model: str
    max_length_tokens: int
    train_on: str
    too_long: str
    packing: bool | str  # train.packing
    template_changes: list[tuple[str, str]]  # (what, why)
    warnings: list[str]
    data_sets: list[DataSet]
    rows: int  # kept, over all data sets, like the next two
    tokens: int
    learned_tokens: int
    rows_per_step: int
    rows_per_epoch: int
    steps_per_epoch: int
    layout: str  # data.layout: with concat a row of an epoch is a sequence, and all others are documents
    cross_document: bool  # there: a token sees the documents before its own
    lengths: Lengths
    padding: PaddedShare
    tokenization: Tokenization | None  # where data.tokenization splits tokens at random
    shown: list[Row]


def look(config: Config, rows: int, reporter: terminal.Reporter) -> DataFigures:
    """Encode the data of a config (or take it from the cache) and lay it out as a run here would; decode `rows` of it.

    Raises DataError and ModelError.
    """
    prepare.check_sources_and_model(config)
    try:
        with library_log():
            reporter.note(f"reading the tokenizer of {config.model.name} …")
            tokenizer = pretrained.read_tokenizer(config.model)
            changes = chat.complete(tokenizer, config.data.chat_template)
            config, architecture = prepare.fitted(config, reporter.warn)
            # How many rows at once a run would take here.
            machine, auto = hardware.detect(), config.train.micro_batch_rows == "auto"
            chosen = autoconfig.resolve(config, machine, Shape.of(architecture))
            data = load.encode(chosen.apply(config), tokenizer, True, reporter.progress)
            autoconfig.share(config, machine, chosen, data, auto)
            again = load.copies(config, tokenizer, data.parts, reporter.progress)
            held_out, warnings = load.held_out(config, tokenizer, data, reporter.progress)
            load.check_held_out(config, held_out)
            pretrained.check_tokens(tokenizer, chosen.shape.vocab, load.texts(data, chain(*held_out.values())))
    finally:
        reporter.stop()
    return measure(config, tokenizer, changes, data, rows, warnings + load.nothing_split(data), again)


def measure(
    config: Config,
    tokenizer: Any,
    changes: list[tuple[str, str]],
    data: Batches,
    rows: int,
    warnings: list[str],
    again: list[Copies],
) -> DataFigures:
    """The figures of encoded data."""
    parts = zip(data.parts, data.weights, data.split, again, strict=True)
    dropped = config.data.deduplicate
    sets = [_data_set(part, weight, len(held), copies, dropped) for part, weight, (_, held), copies in parts]
    lengths = np.concatenate([part.lengths for part in data.parts])
    if data.unit == "documents" and not config.data.cross_document:
        lengths = lengths[lengths >= FEWEST]  # the others are not kept
    return DataFigures(
        name=config.name,
        model=config.model.name,
        max_length_tokens=data.max_length,
        train_on=config.data.train_on,
        too_long=config.data.too_long,
        packing=config.train.packing,
        template_changes=changes,
        warnings=warnings,
        data_sets=sets,
        rows=len(lengths),
        tokens=sum(each.tokens for each in sets),
        learned_tokens=sum(each.learned_tokens for each in sets),
        rows_per_step=data.batch_rows,
        rows_per_epoch=data.rows_per_epoch,
        steps_per_epoch=data.steps_per_epoch,
        layout=config.data.layout,
        cross_document=config.data.cross_document,
        lengths=_lengths(lengths),
        padding=_padding(data, data.total_steps(config.train.epochs, config.train.max_steps)),
        tokenization=_tokenization(config, tokenizer, data),
        shown=_first_rows(data, tokenizer, min(rows, data.rows_per_epoch)),
    )


def _tokenization(config: Config, tokenizer: Any, data: Batches) -> Tokenization | None:
    if config.data.tokenization == "vanilla":
        return None
    documents = (
        part.row(index)[0] for part, (trained, _) in zip(data.parts, data.split, strict=True) for index in trained
    )
    return inspect_tokens.look(config.data.tokenization, [part.counts for part in data.parts], tokenizer, documents)


def _data_set(rows: Rows, weight: float, held_out: int, again: Copies, dropped: bool) -> DataSet:
    counts, gone, gone_tokens, gone_supervised = rows.counts, np.zeros(0, np.int64), 0, 0
    if dropped:
        gone = np.flatnonzero(np.isin(rows.numbers, again.numbers))
        for at in gone.tolist():
            start, end = rows.starts[at], rows.starts[at + 1]
            gone_tokens += int(end - start)
            gone_supervised += int(end - start if rows.supervised is None else rows.supervised[start:end].sum())

    def named(*kinds: str) -> dict[str, int]:
        return {name: n for name, n in sorted(counts.items()) if name.startswith(kinds)}

    def of(kind: str) -> dict[str, int]:
        return {name.removeprefix(kind): n for name, n in named(kind).items()}

    return DataSet(
        source=rows.source,
        weight=weight,
        rows_read=counts["rows"],
        rows_kept=counts["kept"] - len(gone),
        rows_held_out=held_out,
        rows_truncated=counts["truncated"],
        rows_split=counts["split"],
        rows_too_long=counts["dropped_too_long"],
        rows_dropped=of("dropped: "),
        rows_with_unused=named("not used: ", "only text: "),
        rows_lost=of("lost: "),
        rows_with_control_tokens=of("control token: "),
        files_not_read=list(of("not read: ")),
        tokens=counts["tokens"] - gone_tokens,
        learned_tokens=counts["supervised"] - gone_supervised,
        rows_again=again.rows,
        rows_again_elsewhere=again.rows_elsewhere,
        prompts_again=again.prompts,
        prompts_again_elsewhere=again.prompts_elsewhere,
        rows_deduplicated=again.rows if dropped else 0,
    )


def _lengths(lengths: np.ndarray) -> Lengths:
    median, p95, p99 = np.percentile(lengths, [50, 95, 99])
    low, high, top = int(lengths.min()), int(lengths.max()), int(p99)
    width = math.ceil((top - low + 1) / BARS)
    step = max(1, 10 ** (len(str(width)) - 1) // 2)
    width = math.ceil(width / step) * step
    edges = np.arange(low // width * width, top + 1 + width, width)
    if edges[-1] <= high:  # the longest hundredth, however far it reaches
        edges = np.append(edges, high + 1)
    counts, _ = np.histogram(lengths, edges)
    bins = [Bin(int(a), int(b) - 1, int(n)) for (a, b), n in zip(pairwise(edges), counts, strict=True)]
    return Lengths(low, float(median), float(lengths.mean()), float(p95), high, bins)


def _padding(data: Batches, steps: int) -> PaddedShare:
    """As the steps are laid out to be trained on; a beginning that a pack computes once counts with every row of it."""
    packed, padded = (lay_out(replace(data, packed=way, least_shared=0), steps) for way in (True, False))
    shares = [1 - each.tokens / each.cells for each in (padded, packed)]
    computed = data.computed_tokens(packed.steps, data.micro_rows)
    grouped = replace(data, group_by_prompt=data.unit == "rows")
    share = grouped.computed_tokens(packed.steps, data.micro_rows) / sum(map(grouped.tokens_of, range(packed.steps)))
    return PaddedShare(padded.steps, data.micro_rows, shares[0], shares[1], packed.tokens, computed, share)


def _first_rows(data: Batches, tokenizer: Any, wanted: int) -> list[Row]:
    """The first rows of the run, in the order they are trained."""
    found: list[Row] = []
    steps = range(math.ceil(wanted / data.batch_rows))
    for source, number, rows in [each for step in steps for each in data.items(step)][:wanted]:
        parts = [(ids.tolist(), labels(ids, mask) != IGNORE) for ids, mask in rows]
        pieces = [piece for ids, supervised in parts for piece in _pieces(tokenizer, ids, supervised)]
        tokens, learned = sum(len(ids) for ids, _ in parts), sum(int(supervised.sum()) for _, supervised in parts)
        found.append(Row(source, number, tokens, learned, pieces))
    return found


def _pieces(tokenizer: Any, ids: list[int], supervised: np.ndarray) -> list[tuple[str, bool]]:
    """Text of each run of equal `supervised`. Decoded with all before it: some tokenizers lose a first blank."""
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    pieces, before = [], ""
    for start, end in pairwise(edges):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        alone = None if text.startswith(before) else tokenizer.decode(ids[start:end], skip_special_tokens=False)
        pieces.append((text[len(before) :] if alone is None else alone, bool(supervised[start])))
        before = text
    return pieces
