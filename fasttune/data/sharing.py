"""Rows that begin alike, as a tree: what they have in common is computed once, and packs are planned by what is left.

A segment is a run of tokens that the same rows go through: a system prompt, below it the questions, below them the
answers. A token of a segment sees its own segment up to itself, and all of those above it; so every row is computed as
if it were alone, and its loss and gradients are the same.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Encoded = tuple[np.ndarray, np.ndarray]  # ids and whether each is supervised, both (T,)
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
