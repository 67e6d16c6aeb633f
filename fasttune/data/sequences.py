"""Documents end to end, cut into sequences of one length: `data.layout=concat`, as pretraining does it.

Each epoch shuffles the documents of a corpus, lays them end to end and cuts a sequence of T tokens every T - 1: nothing
predicts the first token of a sequence, which is therefore the last one of the sequence before. So every token is
predicted once in an epoch, whatever T is; nothing is padded, and the last sequence is as long as what is left.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from fasttune.data.batching import Batches
from fasttune.data.sharing import Encoded
from fasttune.data.store import Rows

FEWEST = 2  # tokens of a document that sees no other: one alone predicts nothing
DOCUMENT_STREAM = 2 << 32  # keeps the shuffles of documents apart from the other draws of a seed


def predicting(rows: Rows, chosen: np.ndarray) -> np.ndarray:
    """Those of the chosen documents that have something to predict by themselves."""
    return chosen[rows.lengths[chosen] >= FEWEST]


class Stream:
    """Documents of one source in an order, as sequences: [n] is what the n-th consists of.

    That is one row of all its tokens with `cross_document`; else a row for each document that it has a part of, so that
    none sees another, and nothing predicts a document's first token.
    """

    def __init__(self, rows: Rows, order: np.ndarray, max_length: int, cross_document: bool):
        self.rows, self.order, self.max_length, self.cross_document = rows, order, max_length, cross_document
        self.ends = np.cumsum(rows.lengths[order])  # of each document: (documents,)

    @property
    def tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return -(-max(0, self.tokens - 1) // (self.max_length - 1))

    def __getitem__(self, number: int) -> list[Encoded]:
        start = number * (self.max_length - 1)
        end = min(start + self.max_length, self.tokens)
        first = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < end:
            document = int(self.order[first])
            until = min(end, int(self.ends[first]))
            last = int(self.rows.starts[document + 1]) - int(self.ends[first])  # of the source, minus of the stream
            pieces.append(np.asarray(self.rows.ids[last + start : last + until]))
            start, first = until, first + 1
        pieces = [np.concatenate(pieces)] if self.cross_document else [each for each in pieces if len(each) > 1]
        return [(ids, np.ones(len(ids), np.bool_)) for ids in pieces]

    def documents(self, number: int) -> np.ndarray:
        """The numbers in their source of those that a sequence has a part of."""
        start = number * (self.max_length - 1)
        inside = np.searchsorted(self.ends, [start, min(start + self.max_length, self.tokens) - 1], side="right")
        return self.rows.numbers[self.order[inside[0] : inside[1] + 1]]


@dataclass
class Sequences(Batches):
    """As Batches, of sequences in place of rows: `rows_of` numbers them from 0, and `batch_rows` of them are a step.

    draws: the documents as they are in each epoch, where they are split anew (epoch → parts); else empty. An epoch has
    as many sequences as the first one: where it has fewer tokens, its first ones are seen twice.
    """

    cross_document: bool = False
    draws: list[list[Rows]] = field(default_factory=list)
    unit: ClassVar = "documents"

    @cached_property
    def split(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """As of Batches, without the documents that would teach nothing: a step of them would have no loss."""
        whole = super().split
        if self.cross_document:
            return whole
        sets = zip(self.parts, whole, strict=True)
        return [(predicting(rows, trained), predicting(rows, held)) for rows, (trained, held) in sets]

    @cached_property
    def sizes(self) -> list[int]:
        return [len(self._stream(part, 0)) for part in range(len(self.parts))]

    def lengths(self, part: int) -> np.ndarray:
        stream = self._stream(part, 0)
        starts = np.arange(len(stream)) * (self.max_length - 1)
        return np.minimum(starts + self.max_length, stream.tokens) - starts

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        return self.chosen(step)

    def items(self, step: int) -> list[tuple[str, int, list[Encoded]]]:
        epoch, found = step // self.steps_per_epoch, []
        for part, number in self.rows_of(step):
            stream = self._stream(part, epoch)
            found.append((self.parts[part].source, number + 1, stream[number % len(stream)]))
        return found

    def describe(self, step: int) -> str:
        epoch, found = step // self.steps_per_epoch, dict[str, set[int]]()
        for part, number in self.rows_of(step):
            stream = self._stream(part, epoch)
            found.setdefault(self.parts[part].source, set()).update(stream.documents(number % len(stream)).tolist())
        return "; ".join(f"documents {', '.join(map(str, sorted(each)))} of {name}" for name, each in found.items())

    def _stream(self, part: int, epoch: int) -> Stream:
        """That of an epoch; the last one made of each part is kept."""
        kept: dict[int, tuple[int, Stream]] = self.__dict__.setdefault("_kept", {})
        if part not in kept or kept[part][0] != epoch:
            rows = self.draws[epoch % len(self.draws)][part] if self.draws else self.parts[part]
            numbers = self.parts[part].numbers[self.split[part][0]]
            chosen = np.flatnonzero(np.isin(rows.numbers, numbers)).astype(np.int32)
            order = np.random.default_rng([self.seed, DOCUMENT_STREAM, part, epoch]).permutation(chosen)
            kept[part] = epoch, Stream(rows, order, self.max_length, self.cross_document)
        return kept[part][1]
