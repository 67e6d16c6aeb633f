"""What continued pretraining needs beside rows: documents end to end (sequences.py), tokens that are split at random
(subword.py), and files of tokens (megatron.py), each loaded where it is asked for.
"""

import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from fasttune.config import Config
from fasttune.data import tokenize
from fasttune.data.arithmetic import Part
from fasttune.data.batching import Batches
from fasttune.data.sequences import FEWEST, Sequences, Stream, predicting
from fasttune.data.sharing import Encoded
from fasttune.data.store import Rows
from fasttune.data.tokenize import Recipe
from fasttune.errors import DataError
from fasttune.settings import TOKENS

STOCHASTOK_P, EXPAND_SHARE, CONTRACT_SHARE = 0.1, 0.3, 0.3  # github.com/anyasims/stochastok; its Filipino recipe


def recipe_of(
    config: Config,
    source: str,
    tokenizer: Any,
    form: str,
    columns: dict[str, str],
    settings: tuple[Any, ...],
    vanilla: bool,
    draw: int,
) -> Recipe | None:
    """As tokenize.recipe_of, of plain text; None for a file of tokens. Raises DataError."""
    data, splits = config.data, not vanilla and config.data.tokenization != "vanilla"
    if source.endswith(TOKENS):
        if splits:
            raise DataError(f"data: {source} holds tokens already, data.tokenization={data.tokenization} needs text")
        return None
    if form != "text":
        what = "layout=concat" if data.layout == "concat" else f"tokenization={data.tokenization}"
        raise DataError(f"data: {source} has the form {form}: data.{what} is for plain text, rows with a `text`")
    recipe = tokenize.recipe_of(tokenizer, form, columns, *settings)
    if data.layout == "concat":
        if not recipe.template.eos:
            raise DataError("model.name: its tokenizer has no EOS, with which data.layout=concat ends a document")
        recipe = replace(recipe, max_length=sys.maxsize, too_long="split")  # documents whole: they are cut later
    return replace(recipe, splitting=splitting(config), seed=(config.seed, draw)) if splits else recipe


def splitting(config: Config) -> Any:
    """How data.tokenization splits tokens, a subword.Splitting. Raises DataError for affixes that cannot be read."""
    from fasttune.data import subword
    from fasttune.data.affix_lists import affixes_of

    data = config.data
    if data.tokenization == "stochastok":
        return subword.Splitting("stochastok", stochastok_p=_or(data.stochastok_p, STOCHASTOK_P))
    shares = _or(data.expand_share, EXPAND_SHARE), _or(data.contract_share, CONTRACT_SHARE)
    affixes = affixes_of(data.affixes or "")
    return subword.Splitting("patok", expand_share=shares[0], contract_share=shares[1], affixes=affixes)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def tokenized(
    source: str, vocabulary: int, max_documents: int | None, apart: bool, progress: Callable[[float], None]
) -> Rows:
    """The documents of Megatron's PREFIX.bin and PREFIX.idx. Raises DataError, also for ids beyond the vocabulary.

    apart: no document sees another, so those of one token are counted as dropped; they stay in what is returned, and
    sequences.Sequences leaves them out.
    """
    from fasttune.data import megatron

    found = megatron.read(source)
    starts = found.starts[: None if max_documents is None else max_documents + 1]
    lengths = np.diff(starts)
    largest, checksum = found.scan(int(starts[-1]), zlib.crc32(starts.data), progress)
    if largest >= vocabulary:
        told = f"holds the token id {largest:,}, the tokenizer of the model has {vocabulary:,} tokens"
        raise DataError(f"data: {source} {told}: tokenise the text again, `fasttune tokenize`, or name its model")
    kept = lengths[lengths >= FEWEST] if apart else lengths
    counts = Counter(rows=len(lengths), kept=len(kept), tokens=int(kept.sum()), supervised=int(kept.sum()))
    if few := len(lengths) - len(kept):
        counts["dropped: of fewer than two tokens, so none predicts another"] = few
    numbers = np.arange(1, len(lengths) + 1)
    return Rows(source, found.ids, None, starts, numbers, counts, f"{checksum:08x}")


def sequences(config: Config, settings: dict[str, Any], draw: Callable[[int], list[Rows]]) -> Sequences:
    """The steps of data.layout=concat; `draw` gives the documents of another epoch, where each splits tokens anew."""
    made = Sequences(**settings, cross_document=config.data.cross_document)
    if config.data.redraw and made.rows_per_epoch:
        steps = made.total_steps(config.train.epochs, config.train.max_steps)
        epochs = math.ceil(steps / made.steps_per_epoch)
        made.draws = [made.parts, *map(draw, range(1, epochs))]
    return made


def held_out(
    config: Config, batches: Batches, count: int, encode: Callable[[str, Part, np.ndarray | None], Rows]
) -> tuple[dict[str, list[Encoded]], list[str]]:
    """(source → what `count` sequences of held-out documents consist of, evenly spread over all; what to warn of).

    Their tokens are as the tokenizer makes them, whatever the training ones are.
    """
    data = config.data
    if data.eval is not None:
        rows = encode(data.eval, "test", None)
        parts = [(rows, np.arange(len(rows)))]
    else:
        split = zip(batches.parts, batches.split, strict=True)
        parts = [(rows, held) for rows, (_, held) in split if len(held)]
        if data.tokenization != "vanilla":  # in training they are whole, as others are: a split depends on its document
            plain = [encode(rows.source, "train", np.asarray(rows.numbers[held])) for rows, held in parts]
            parts = [(rows, np.arange(len(rows))) for rows in plain]
    parts = [(rows, chosen if data.cross_document else predicting(rows, chosen)) for rows, chosen in parts]
    streams = [Stream(rows, chosen, config.model.max_length, data.cross_document) for rows, chosen in parts]
    places = [(stream, number) for stream in streams for number in range(len(stream))]
    count = min(count, len(places))
    found: dict[str, list[Encoded]] = {}
    for stream, number in (places[at * len(places) // count] for at in range(count)):
        if pieces := stream[number]:
            found.setdefault(stream.rows.source, []).extend(pieces)
    warnings = []
    if data.eval is not None and data.tokenization == "vanilla" and (seen := _trained_too(parts[0][0], batches)):
        told = f"of {len(parts[0][0]):,} held-out documents {seen:,} are trained on, too"
        warnings.append(f"{told}: what is measured on them says little; remove them from one of the two")
    return found, warnings


def _trained_too(held_out: Rows, batches: Batches) -> int:
    """How many held-out documents are among those that are trained on, as the same tokens."""

    def hashes(rows: Rows) -> Iterator[int]:
        pieces = (rows.ids[start:end] for start, end in pairwise(rows.starts.tolist()))
        return (hash(ids.astype(np.int32).tobytes()) for ids in pieces)

    held = list(hashes(held_out))
    wanted = set(held)
    seen = {each for rows in batches.parts for each in hashes(rows) if each in wanted}
    return sum(each in seen for each in held)
