"""Which process of a run trains on which rows of a step: as equal numbers of computed tokens as can be.

Rows that begin alike stay together, unless they are more than one process should have: then each process that gets some
of them computes the beginning too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fasttune.data.sharing import Segment


@dataclass(frozen=True)
class Unit:
    """Rows that go to one process: `tokens` of their own, behind the segments `above` that other units share."""

    rows: list[int]
    tokens: int
    above: tuple[Segment, ...]


def deal(segments: list[Segment], ranks: int) -> list[list[int]]:
    """The rows of each process, in their order; a process may get none. Deterministic.

    Longest processing time first, at most 4/3 of the least possible: https://doi.org/10.1137/0117039
    """
    fair_tokens = sum(segment.tokens for segment in segments) / ranks
    units = sorted(_units(segments, fair_tokens), key=lambda unit: -unit.tokens)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = np.zeros(ranks, np.int64)
    held: dict[int, np.ndarray] = {}  # segment → which processes compute it already
    for unit in units:
        costs = np.full(ranks, unit.tokens, np.int64)
        for segment in unit.above:
            has = held.setdefault(id(segment), np.zeros(ranks, np.bool_))
            costs += np.where(has, 0, segment.end - segment.start)
        rank = int(np.argmin(loads + costs))
        loads[rank] += costs[rank]
        for segment in unit.above:
            held[id(segment)][rank] = True
        dealt[rank] += unit.rows
    return [sorted(rows) for rows in dealt]


def _units(segments: list[Segment], most_tokens: float, above: tuple[Segment, ...] = ()) -> Iterator[Unit]:
    """Whole segments where they are small enough, else what is below them."""
    for segment in segments:
        if segment.tokens <= most_tokens or not segment.below:
            yield Unit(segment.rows, segment.tokens, above)
            continue
        if segment.ending:
            yield Unit(segment.ending, 0, (*above, segment))
        yield from _units(segment.below, most_tokens, (*above, segment))
