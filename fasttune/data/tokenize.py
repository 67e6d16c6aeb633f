"""Texts with learned spans → token ids and labels. A token is learned when its first character lies in a learned span.

Works on a plain `tokenizers` tokenizer, so that worker processes need neither torch nor transformers' classes.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from fasttune.data import beside, chat, formats, long_texts, sandbox
from fasttune.data.chat import Span, Template
from fasttune.data.control import ControlTokens
from fasttune.data.files import Chunk
from fasttune.data.formats import Conversation, Row
from fasttune.errors import DataError

IGNORE = -100  # label of a token that is read, but not learned
MOST_COUNTS = 100  # of a chunk; rows whose every column has a name of its own fill no memory
SHOWN_CHARACTERS = 160  # of a row in an error
HOPELESS_ROWS = 100  # a template that refuses so many from the first on is not asked again


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
    allow_lost: tuple[str, ...] = ()  # of config.LOSSES
    control_tokens: str = "keep"  # keep | text


@dataclass
class Block:
    """Encoded rows, laid end to end. ids: int32 (tokens,); learned: bool (tokens,); lengths, numbers: (rows,).

    numbers: the line or row of the source each row came from. counts: what happened to which rows, by name; examples:
    the start of one row for each reason to drop it.
    """

    ids: np.ndarray
    learned: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    counts: Counter[str]
    examples: dict[str, str] = field(default_factory=dict)


class Encoder:
    """Encodes chunks of rows by one recipe."""

    def __init__(self, recipe: Recipe):
        from tokenizers import Tokenizer

        self.recipe = recipe
        self.tokenizer = Tokenizer.from_str(recipe.tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.control = ControlTokens(self.tokenizer)
        self.refused = 0  # rows, by the chat template
        self.as_text: dict[int, list[Span]] = {}  # number of a row → where it has control tokens that are text

    def encode(self, chunk: Chunk) -> Block:
        """All rows of a chunk; one that teaches nothing is dropped and counted. Raises DataError for a wrong form."""
        counts: Counter[str] = Counter()
        examples: dict[str, str] = {}
        texts, spans, numbers = self._texts(chunk, counts, examples)
        ids: list[int] = []
        lengths: list[int] = []
        kept: list[int] = []
        learned: list[Span] = []  # of tokens, in `ids`
        limit = self.recipe.max_length + 1  # tokens; a row that has them is too long
        encodings = long_texts.encode_batch(self.tokenizer, texts, None if self.recipe.too_long == "split" else limit)
        for encoding, text, row_spans, number in zip(encodings, texts, spans, numbers, strict=True):
            row, token_spans = encoding.ids, _token_spans(encoding, len(encoding.ids), len(text), row_spans)
            if number in self.as_text:
                row, token_spans = self._in_pieces(text, row_spans, self.as_text.pop(number))
            token_spans = [span for span in token_spans if span[0] < span[1]]
            pieces = self._fit(len(row), token_spans, counts)
            for start, end, inside in pieces:
                learned += [(len(ids) + a, len(ids) + b) for a, b in inside]
                ids += row[start:end] if (start, end) != (0, len(row)) else row
                lengths.append(end - start)
                kept.append(number)
            if not pieces and len(row) <= self.recipe.max_length:
                _drop("no learned token", text, counts, examples)
            elif not pieces and self.recipe.too_long != "drop":
                _drop(f"no learned token within model.max_length={self.recipe.max_length}", text, counts, examples)
        mask = np.zeros(len(ids), bool)
        for start, end in learned:
            mask[start:end] = True
        return Block(
            np.array(ids, np.int32), mask, np.array(lengths, np.int32), np.array(kept, np.int64), counts, examples
        )

    def _texts(
        self, chunk: Chunk, counts: Counter[str], examples: dict[str, str]
    ) -> tuple[list[str], list[list[Span]], list[int]]:
        texts, spans, numbers = [], [], []
        rows = list(chunk.numbered())
        with sandbox.bounded():
            for number, place, row in rows:
                if (found := self._text(number, place, row, counts, examples)) is not None:
                    texts.append(found[0])
                    spans.append(found[1])
                    numbers.append(number)
        return texts, spans, numbers

    def _text(
        self, number: int, place: str, row: Row, counts: Counter[str], examples: dict[str, str]
    ) -> tuple[str, list[Span]] | None:
        """Text and learned spans of a row; None for one that teaches nothing, which is counted."""
        recipe, columns = self.recipe, dict(self.recipe.columns)
        counts["rows"] += 1
        row = formats.rename(row, columns, place)
        beside.check(row, place)
        try:
            conversation = formats.convert(row, recipe.form, place)
            if recipe.train_on == "all" and isinstance(conversation, Conversation) and conversation.left_out:
                raise DataError(
                    f"data: {place} has turns not to be trained on, which data.train_on=all would ignore: set "
                    "data.train_on=assistant, or remove the flags"
                )
            control = self.control.in_row(conversation)
            as_text = control and recipe.control_tokens == "text"
            conversation = self.control.marked(conversation) if as_text else conversation
            text, learned = recipe.template.text(conversation, recipe.train_on, place, recipe.allow_lost, counts)
            if as_text:
                text, learned, self.as_text[number] = self.control.unmarked(text, learned)
        except formats.Unusable as reason:
            self.refused += isinstance(reason, formats.Refused)
            if self.refused == number == HOPELESS_ROWS:
                raise DataError(
                    f"data: {place}: this row and all {HOPELESS_ROWS - 1} before it are {reason}: fix the rows, "
                    "or use a model with another template"
                ) from reason
            _drop(str(reason), str(row), counts, examples)
            return None
        beside.check_text(text, place)
        counts.update(f"control token: {name}" for name in control)
        if len(counts) < MOST_COUNTS:
            counts.update(f"not used: {name}" for name in beside.not_used(row, formats.COLUMNS[recipe.form]))
        counts.update(f"only text: {mark}" for mark in beside.MEDIA_MARKS if mark in text)
        return text, learned

    def _in_pieces(self, text: str, spans: list[Span], as_text: list[Span]) -> tuple[list[int], list[Span]]:
        """Ids and learned spans of tokens, of a text of which some places hold no control tokens, whatever they say."""
        edges = [0, *(at for span in as_text for at in span), len(text)]
        ids: list[int] = []
        found: list[Span] = []
        for number, (start, end) in enumerate(pairwise(edges)):
            self.tokenizer.encode_special_tokens = number % 2 == 1
            encoding = self.tokenizer.encode(text[start:end], add_special_tokens=False)
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in spans if a < end and b > start]
            tokens = _token_spans(encoding, len(encoding.ids), end - start, inside)
            found += [(len(ids) + a, len(ids) + b) for a, b in tokens]
            ids += encoding.ids
        self.tokenizer.encode_special_tokens = False
        return ids, found

    def _fit(self, length: int, learned: list[Span], counts: Counter[str]) -> list[tuple[int, int, list[Span]]]:
        """Pieces (start, end, learned spans inside, relative to start) of a row of `length` tokens.

        What follows the last learned token teaches nothing and is cut off. A split row's pieces overlap by one token,
        because the first token of a piece cannot be learned: there is nothing to predict it from.
        """
        limit = self.recipe.max_length
        if length <= limit:
            return _pieces([(0, length)], learned)
        counts[{"drop": "dropped_too_long", "truncate": "truncated", "split": "split"}[self.recipe.too_long]] += 1
        if self.recipe.too_long == "drop":
            return []
        if self.recipe.too_long == "truncate":
            return _pieces([(0, limit)], learned)
        return _pieces([(start, min(start + limit, length)) for start in range(0, length - 1, limit - 1)], learned)


def recipe_of(
    tokenizer: Any,
    form: str,
    columns: dict[str, str],
    train_on: str,
    max_length: int,
    too_long: str,
    allow_lost: Sequence[str] = (),
    control_tokens: str = "keep",
) -> Recipe:
    """The Recipe of a transformers fast tokenizer, whose template is `chat.complete`."""
    return Recipe(
        tokenizer.backend_tokenizer.to_str(),
        chat.template_of(tokenizer),
        form,
        tuple(sorted(columns.items())),
        train_on,
        max_length,
        too_long,
        tuple(allow_lost),
        control_tokens,
    )


def labels(ids: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """int64 labels of one row: its ids where learned, else IGNORE; never its first token, which nothing predicts."""
    out = np.where(learned, ids, IGNORE).astype(np.int64)
    out[:1] = IGNORE
    return out


def _pieces(ranges: list[Span], learned: list[Span]) -> list[tuple[int, int, list[Span]]]:
    pieces = []
    for start, end in ranges:
        # nothing predicts the first token of a piece
        inside = [(max(a, start + 1) - start, min(b, end) - start) for a, b in learned if a < end and b > start + 1]
        if inside:
            pieces.append((start, start + inside[-1][1], inside))
    return pieces


def _token_spans(encoding: Any, tokens: int, characters: int, spans: list[Span]) -> list[Span]:
    """Character spans → spans of the tokens whose first character lies in them."""
    if spans == [(0, characters)]:
        return [(0, tokens)]
    bounds = [_first_token_from(encoding, tokens, characters, at) for span in spans for at in span]
    if None in bounds:  # a character no token covers, e.g. a blank trimmed from the offsets
        starts = [start for start, _ in encoding.offsets]
        return [(bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans]
    return list(zip(bounds[::2], bounds[1::2], strict=True))  # type: ignore[arg-type]


def _first_token_from(encoding: Any, tokens: int, characters: int, at: int) -> int | None:
    """Index of the first token that begins at character `at` or later; None if that takes the full list of offsets."""
    if at == characters:
        return tokens
    token = encoding.char_to_token(at)
    if token is None:
        return None
    return token if encoding.token_to_chars(token)[0] >= at else token + 1


def _drop(reason: str, text: str, counts: Counter[str], examples: dict[str, str]) -> None:
    counts[f"dropped: {reason}"] += 1
    examples.setdefault(reason, text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")
