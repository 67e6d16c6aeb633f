"""Texts with supervised spans → token ids and labels. A token is supervised when its first character lies in a
supervised span.

Works on a plain `tokenizers` tokenizer, so that worker processes need neither torch nor transformers' classes.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from fasttune.data import chat, formats, sandbox
from fasttune.data.chat import ControlTokens, Span, Template
from fasttune.data.formats import Conversation, Row
from fasttune.data.sources import Chunk
from fasttune.errors import DataError

IGNORE = -100  # label of a token that is read, but not supervised
MOST_COUNTS = 100  # of a chunk, by name: a file may have a new column name in every row
SHOWN_CHARACTERS = 160  # of a row in an error
HOPELESS_ROWS = 100  # a template that refuses so many from the first on is not asked again
WINDOW = 1 << 18  # characters that are encoded at once: a tokenizer takes 200 to 300 times the size of a text
TOO_LONG = {"drop": "dropped_too_long", "truncate": "truncated", "split": "split"}  # as they are counted


@dataclass(frozen=True)
class Recipe:
    """Everything, beside the rows, that decides their tokens and labels; it can be pickled and hashed."""

    tokenizer_json: str
    template: Template
    form: str  # a key of formats.COLUMNS
    columns: tuple[tuple[str, str], ...]
    train_on: str  # assistant | last | all
    max_length: int
    too_long: str  # truncate | drop | split
    allow_lost: tuple[str, ...] = ()  # of settings.LOSSES
    control_tokens: str = "keep"  # keep | text
    splitting: Any = None  # a subword.Splitting: of plain text, tokens are split at random
    seed: tuple[int, int] = (0, 0)  # of the splits: the run's, and how often they were drawn before


@dataclass
class Block:
    """Encoded rows, laid end to end. ids: int32 (tokens,); supervised: bool (tokens,); lengths, numbers: (rows,).

    numbers: the line or row of the source each row came from. counts: what happened to which rows, by name; examples:
    the start of one row for each reason to drop it.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def recipe_of(tokenizer: Any, form: str, columns: dict[str, str], *settings: Any) -> Recipe:
    """The Recipe of a fast tokenizer of transformers with a template (chat.complete). settings: its last fields."""
    text, template = tokenizer.backend_tokenizer.to_str(), chat.template_of(tokenizer)
    return Recipe(text, template, form, tuple(sorted(columns.items())), *settings)


def labels(ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """int64 labels of one row: its ids where supervised, else IGNORE; never its first token, which nothing predicts."""
    out = np.where(supervised, ids, IGNORE).astype(np.int64)
    out[:1] = IGNORE
    return out


class Encoder:
    """Encodes chunks of rows by one recipe."""

    def __init__(self, recipe: Recipe):
        from tokenizers import Tokenizer

        self.recipe = recipe
        self.tokenizer = Tokenizer.from_str(recipe.tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.control = ControlTokens(self.tokenizer)
        self.splitter = recipe.splitting and recipe.splitting.splitter(self.tokenizer)
        self.refused = 0  # rows, by the chat template

    def encode(self, chunk: Chunk) -> Block:
        """All rows of a chunk; one that teaches nothing is dropped and counted. Raises DataError for a wrong form."""
        recipe, counts, examples = self.recipe, Counter[str](), dict[str, str]()

        def drop(reason: str, text: str) -> None:
            counts[f"dropped: {reason}"] += 1
            examples.setdefault(reason, text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")

        rows = []
        numbered = list(chunk.numbered())
        with sandbox.bounded():
            for number, place, row in numbered:
                counts["rows"] += 1
                try:
                    rows.append((number, *self._text(number, place, row, counts)))
                except formats.Unusable as reason:
                    drop(str(reason), str(row))
        ids: list[int] = []
        supervised: list[Span] = []  # of tokens, in `ids`
        kept: list[tuple[int, int]] = []  # length and number of each row
        enough = None if recipe.too_long == "split" else recipe.max_length + 1  # tokens; with these a row is too long
        encodings = encode_batch(self.tokenizer, [text for _, text, _, _ in rows], enough)
        for encoding, (number, text, spans, apart) in zip(encodings, rows, strict=True):
            if apart:
                from fasttune.data import as_text

                row_ids, tokens = as_text.encode(self.tokenizer, text, spans, apart)
            else:
                row_ids, tokens = encoding.ids, token_spans(encoding, len(text), spans)
            if self.splitter:
                row_ids = self.splitter.document(row_ids, recipe.template, (*recipe.seed, number), counts)
                tokens = [(0, len(row_ids))]
            pieces = self._pieces(len(row_ids), [span for span in tokens if span[0] < span[1]], counts)
            for start, end, inside in pieces:
                supervised += [(len(ids) + a, len(ids) + b) for a, b in inside]
                ids += row_ids[start:end] if (start, end) != (0, len(row_ids)) else row_ids
                kept.append((end - start, number))
            if not pieces and len(row_ids) <= recipe.max_length:
                drop("no supervised token", text)
            elif not pieces and recipe.too_long != "drop":
                drop(f"no supervised token within model.max_length={recipe.max_length}", text)
        mask = np.zeros(len(ids), bool)
        for start, end in supervised:
            mask[start:end] = True
        lengths, numbers = np.array(kept, np.int64).reshape(-1, 2).T
        return Block(np.array(ids, np.int32), mask, lengths.astype(np.int32), numbers.copy(), counts, examples)

    def _text(self, number: int, place: str, row: Row, counts: Counter[str]) -> tuple[str, list[Span], list[Span]]:
        """(text, its supervised spans, where it has control tokens that are text) of a row.

        Raises Unusable for one that teaches nothing, DataError for a wrong one.
        """
        recipe = self.recipe
        row = formats.rename(row, dict(recipe.columns), place)
        formats.check_row(row, place)
        conversation = formats.convert(row, recipe.form, place)
        if recipe.train_on == "all" and isinstance(conversation, Conversation) and conversation.left_out:
            raise DataError(
                f"data: {place} has turns not to be trained on, which data.train_on=all would ignore: set "
                "data.train_on=assistant, or remove the flags"
            )
        control = self.control.in_row(conversation)
        if apart := bool(control) and recipe.control_tokens == "text":
            from fasttune.data import as_text

            conversation = as_text.marked(conversation, self.control.pattern)
        try:
            text, spans = recipe.template.text(conversation, recipe.train_on, place, recipe.allow_lost, counts)
        except formats.Refused as reason:
            self.refused += 1
            if self.refused == number == HOPELESS_ROWS:
                raise DataError(
                    f"data: {place}: this row and all {HOPELESS_ROWS - 1} before it are {reason}: fix the rows, "
                    "or set another template (data.chat_template)"
                ) from reason
            raise
        places: list[Span] = []
        if apart:
            text, spans, places = as_text.unmarked(text, spans, self.control.pattern)
        formats.check_text(text, place)
        counts.update(f"control token: {name}" for name in control)
        if len(counts) < MOST_COUNTS:
            counts.update(f"not used: {name}" for name in formats.not_used(row, recipe.form))
        counts.update(f"only text: {mark}" for mark in formats.MEDIA_MARKS if mark in text)
        return text, spans, places

    def _pieces(self, length: int, spans: list[Span], counts: Counter[str]) -> list[tuple[int, int, list[Span]]]:
        """Pieces (start, end, supervised spans inside, relative to start) of a row of `length` tokens.

        What follows the last supervised token teaches nothing and is cut off. A split row's pieces overlap by one
        token, because nothing predicts the first token of a piece.
        """
        limit, too_long = self.recipe.max_length, self.recipe.too_long
        ranges = [(0, length)]
        if length > limit:
            counts[TOO_LONG[too_long]] += 1
            ranges = [] if too_long == "drop" else [(0, limit)]
            if too_long == "split":
                ranges = [(start, min(start + limit, length)) for start in range(0, length - 1, limit - 1)]
        pieces = []
        for start, end in ranges:
            inside = [(max(a, start + 1) - start, min(b, end) - start) for a, b in spans if a < end and b > start + 1]
            if inside:
                pieces.append((start, start + inside[-1][1], inside))
        return pieces


def token_spans(encoding: Any, characters: int, spans: list[Span]) -> list[Span]:
    """Character spans → spans of the tokens whose first character lies in them."""
    tokens = len(encoding.ids)
    if spans == [(0, characters)]:
        return [(0, tokens)]
    bounds = []
    for at in chain.from_iterable(spans):
        token = tokens if at == characters else encoding.char_to_token(at)
        if token is None:  # a character no token covers, e.g. a blank trimmed from the offsets
            starts = [start for start, _ in encoding.offsets]
            return [(bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans]
        bounds.append(token + (at < characters and encoding.token_to_chars(token)[0] < at))
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def encode_batch(tokenizer: Any, texts: list[str], enough: int | None) -> list[Any]:
    """As tokenizer.encode_batch without special tokens. Of a long text only `enough` tokens are wanted (None: all)."""
    short = iter(tokenizer.encode_batch([text for text in texts if len(text) <= WINDOW], add_special_tokens=False))
    return [next(short) if len(text) <= WINDOW else _in_windows(tokenizer, text, enough) for text in texts]


def _in_windows(tokenizer: Any, text: str, enough: int | None) -> Any:
    from fasttune.data import windows

    return windows.encode(tokenizer, text, WINDOW, enough)
