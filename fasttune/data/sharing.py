"""Rows that begin alike, as a tree: what they have in common is computed once, and packs are planned by what is left.

A segment is a run of tokens that the same rows go through: a system prompt, below it the questions, below them the
answers. A token of a segment sees its own segment up to itself, and all of those above it; so every row is computed as
if it were alone, and its loss and gradients are the same.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttune.data.tokenize import IGNORE, labels

Encoded = tuple[np.ndarray, np.ndarray]  # ids and whether each is supervised, both (T,)
MicroBatch = dict[str, Any]  # arrays by the names a transformers model takes them
# Where Unsloth and RowsAttention read them: not moved to a GPU. The last two say which row tokens and labels belong to.
ON_HOST = ("packed_seq_lengths", "segment_parents", "segment_owners", "row_ends")
LEAST = 8  # tokens of a segment on a CPU; fewer cost more in small matmuls than they save


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` of each of `rows`, and what follows them. owner: the row they are supervised in, or None.

    Its first token is supervised in no row, unless it begins one: what predicts it lies elsewhere.
    """

    start: int
    end: int
    rows: list[int]
    owner: int | None
    below: list["Segment"]

    @property
    def tokens(self) -> int:
        """Computed for all of its rows, from `start` on."""
        return self.end - self.start + sum(each.tokens for each in self.below)

    @property
    def ending(self) -> list[int]:
        """Rows with nothing after it."""
        further = {row for each in self.below for row in each.rows}
        return [row for row in self.rows if row not in further]

    def in_order(self, parent: int = -1, at: int = 0) -> Iterator[tuple["Segment", int]]:
        """It and all below it, depth first, each with the number of the one it continues; its own number is `at`."""
        yield self, parent
        after = at + 1
        for each in self.below:
            for found in each.in_order(at, after):
                yield found
                after += 1


def tree(rows: Sequence[Encoded], least: int = LEAST) -> list[Segment]:
    """The segments that rows begin with, in the order of the rows; what is shared has at least so many tokens.

    least=0: nothing is, each row lies by itself.
    """
    everything = list(range(len(rows)))
    return _continue(rows, everything, 0, least) if least else [_alone(rows, row, 0) for row in everything]


def _alone(rows: Sequence[Encoded], row: int, start: int) -> Segment:
    return Segment(start, len(rows[row][0]), [row], row, [])


def _continue(rows: Sequence[Encoded], group: list[int], start: int, least: int) -> list[Segment]:
    """The segments of rows that are the same up to `start`."""
    by_token: dict[int, list[int]] = {}
    for row in group:
        if len(rows[row][0]) > start:
            by_token.setdefault(int(rows[row][0][start]), []).append(row)
    found = [segment for alike in by_token.values() for segment in _begin(rows, alike, start, least)]
    return sorted(found, key=lambda segment: segment.rows[0])


def _begin(rows: Sequence[Encoded], group: list[int], start: int, least: int) -> list[Segment]:
    """As `_continue`, of rows with the same token there."""
    if len(group) == 1:
        return [_alone(rows, group[0], start)]
    shortest = min(len(rows[row][0]) for row in group)
    ids = np.stack([rows[row][0][start:shortest] for row in group])
    supervised = np.stack([rows[row][1][start:shortest] for row in group])
    if start == 0:
        supervised[:, 0] = False  # nothing predicts a row's first token
    # One token has one label: rows stay together until a second one of them is supervised.
    owners = np.logical_or.accumulate(supervised, axis=1)
    same = _first(~(ids == ids[0]).all(0))
    end = start + min(same, _first(owners.sum(0) > 1))
    while end > start and any(rows[row][1][end : end + 1].any() for row in group):
        end -= 1  # what follows a segment is predicted by its last token, which belongs to all of its rows
    if end - start >= least:
        owned = [row for row, own in zip(group, owners[:, end - start - 1], strict=True) if own]
        return [Segment(start, end, group, owned[0] if owned else None, _continue(rows, group, end, least))]
    # Too little: apart by where they differ, or without those that are supervised first.
    first = [start + _first(rows[row][1][start:]) for row in group]
    parts: dict[int, list[int]] = {}
    for row, supervised_at in zip(group, first, strict=True):
        alone = supervised_at == min(first) if same >= least else len(rows[row][0]) == start + same
        key = -1 if same >= least else int(rows[row][0][start + same : start + same + 1].sum())
        parts.setdefault(-2 - row if alone else key, []).append(row)
    return [segment for alike in parts.values() for segment in _begin(rows, alike, start, least)]


def _first(true: np.ndarray) -> int:
    return int(true.argmax()) if true.any() else len(true)


def prompts(rows: Iterable[Encoded]) -> np.ndarray:
    """A number for each row, the same where all before the first supervised token is the same: (rows,).

    Plain text has no prompt, only a first token that nothing predicts: the same text has the same number.
    """
    numbers: dict[bytes, int] = {}
    parts = (ids[:answer] if (answer := _first(supervised)) > 1 else ids for ids, supervised in rows)
    keys = (hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in parts)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def together(order: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The rows of an order with those of one prompt one after the other, where the first of them was."""
    _, first, group = np.unique(prompts[order], return_index=True, return_inverse=True)
    return order[np.argsort(first[group], kind="stable")]


def plan(rows: Sequence[Encoded], capacity: int, least: int = LEAST) -> list[list[Segment]]:
    """The trees of packs of at most `capacity` computed tokens, by best fit; rows that begin alike lie in
    one where they fit.

    A row longer than that has a pack of its own. Deterministic.
    """
    whole = tree(rows, least)
    return [_part_of(rows, whole, pack) for pack, _ in _fitted([], whole, 0, capacity)]


def _part_of(rows: Sequence[Encoded], segments: list[Segment], wanted: list[int]) -> list[Segment]:
    """What remains of segments with the wanted rows alone, in their order."""
    found = {}
    for each in segments:
        kept = [row for row in wanted if row in each.rows]
        if len(kept) == 1:
            found[kept[0]] = _alone(rows, kept[0], each.start)
        elif kept:
            owner = each.owner if each.owner in kept else None
            found[kept[0]] = Segment(each.start, each.end, kept, owner, _part_of(rows, each.below, kept))
    return [found[row] for row in wanted if row in found]


def _fitted(ending: list[int], below: list[Segment], above: int, capacity: int) -> list[tuple[list[int], int]]:
    """(rows, computed tokens) of packs that begin with the same `above` tokens: rows that end there, and others."""
    items: list[tuple[list[int], int]] = []
    for segment in below:
        if above + segment.tokens <= capacity or not segment.below:
            items.append((segment.rows, above + segment.tokens))
        else:
            to = above + segment.end - segment.start
            items += _fitted(segment.ending, segment.below, to, capacity)
    if ending:  # these rows add nothing to any pack
        items[0] = ([*ending, *items[0][0]], items[0][1])
    packs = best_fit([tokens - above for _, tokens in items], capacity - above)
    return [
        ([row for i in pack for row in items[i][0]], above + sum(items[i][1] - above for i in pack)) for pack in packs
    ]


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indexes of `lengths` in packs of at most `capacity` tokens: best-fit decreasing, each row into the fullest pack
    that takes it. A row longer than that has a pack of its own. Deterministic.

    Source: https://doi.org/10.1137/0203025 (at most 11/9 of the fewest possible packs).
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            packs.append([index])
            free, pack = capacity - lengths[index], len(packs) - 1
        else:
            free, pack = room.pop(place)
            packs[pack].append(index)
            free -= lengths[index]
        if free > 0:
            insort(room, (free, pack))
    return packs


def pack(rows: list[Encoded], segments: list[Segment]) -> MicroBatch:
    """Rows of one length as a plain rectangle (B, T), which takes no row lengths and no mask; others flat (1, T)."""
    made = flat(rows, segments)
    if len({each.end for each in segments}) > 1 or "segment_parents" in made:
        return made
    return {name: made[name].reshape(len(segments), -1) for name in ("input_ids", "labels")}


def padded(rows: list[Encoded], pad_id: int) -> MicroBatch:
    """Rows below each other, as long as the longest: input_ids, labels, attention_mask (B, T)."""
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    batch = {
        "input_ids": np.full(shape, pad_id, np.int64),
        "labels": np.full(shape, IGNORE, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
    }
    for at, (ids, supervised) in enumerate(rows):
        batch["input_ids"][at, : len(ids)] = ids
        batch["labels"][at, : len(ids)] = labels(ids, supervised)
        batch["attention_mask"][at, : len(ids)] = 1
    return batch


def flat(rows: list[Encoded], segments: list[Segment] | None = None) -> MicroBatch:
    """Rows end to end, nothing padded: input_ids, labels, position_ids (1, T) and packed_seq_lengths (rows,).

    Positions restart with each row, and no row's first token is supervised, so that rows never see each other.
    Where rows share `segments`, packed_seq_lengths are theirs, and there are also segment_parents
    (the number of the segment that each continues, or -1), segment_owners (the row that each is supervised in, or -1)
    and row_ends (the last segment of each row). Positions continue those of the parent.
    """
    found: list[tuple[Segment, int]] = []
    for beginning in tree(rows, 0) if segments is None else segments:
        found += beginning.in_order(at=len(found))
    pieces = [(rows[each.rows[0] if each.owner is None else each.owner], each) for each, _ in found]
    batch = {
        "input_ids": np.concatenate([ids[each.start : each.end] for (ids, _), each in pieces]).astype(np.int64)[None],
        "labels": np.concatenate([_labels(row, each) for row, each in pieces])[None],
        "position_ids": np.concatenate([np.arange(each.start, each.end) for _, each in pieces])[None],
        "packed_seq_lengths": np.array([each.end - each.start for _, each in pieces], np.int32),
    }
    if all(parent < 0 and len(each.rows) == 1 for each, parent in found):
        return batch
    ends = {row: number for number, (each, _) in enumerate(found) for row in each.rows}
    numbers = {row: number for number, row in enumerate(ends)}
    return batch | {
        "segment_parents": np.array([parent for _, parent in found], np.int32),
        "segment_owners": np.array(
            [numbers[each.owner] if each.owner is not None else -1 for each, _ in found], np.int32
        ),
        "row_ends": np.array(list(ends.values()), np.int32),
    }


def _labels(row: Encoded, segment: Segment) -> np.ndarray:
    if segment.owner is None:
        return np.full(segment.end - segment.start, IGNORE)
    return labels(*row)[segment.start : segment.end]


def paths(batch: MicroBatch) -> list[list[int]]:
    """The segments that each row of a flat micro-batch goes through, from its beginning."""
    if "row_ends" not in batch:
        return [[number] for number in range(len(batch["packed_seq_lengths"]))]
    parents = batch["segment_parents"].tolist()
    found = []
    for end in batch["row_ends"].tolist():
        path = [end]
        while (parent := parents[path[0]]) >= 0:
            path.insert(0, parent)
        found.append(path)
    return found
