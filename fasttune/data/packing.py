"""Which rows a step learns from, and how they are laid out: seeded order → steps → packs. Pure functions on lengths.

A step is always the same rows, packed or padded: packing decides only how they lie in memory.
"""

from bisect import bisect_left, insort

import numpy as np


def epoch_order(sizes: list[int], weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """Global row indexes of one epoch, shuffled; rows of data set d have the indexes after those of the sets before it.

    weights: how often a row of each set is seen in an epoch. 2 is twice, 0.5 is every other row (others each epoch).
    """
    rng = np.random.default_rng([seed, epoch])
    chosen, first = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole, part = divmod(weight, 1.0)
        rows = np.arange(first, first + size)
        chosen += [np.tile(rows, int(whole)), rng.permutation(rows)[: round(part * size)]]
        first += size
    return rng.permutation(np.concatenate(chosen))


def rows_per_epoch(sizes: list[int], weights: list[float]) -> int:
    """How many rows `epoch_order` gives."""
    return sum(size * int(weight) + round((weight % 1.0) * size) for size, weight in zip(sizes, weights, strict=True))


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


def fill(lengths: list[int], packs: list[list[int]], capacity: int) -> float:
    """Share of the packs' capacity that holds tokens."""
    return sum(lengths) / (len(packs) * capacity)


def rectangles(lengths: list[int], rows: int) -> list[list[int]]:
    """The same rows for padded micro-batches of `rows` rows, in their order: what cannot be packed runs like this."""
    return [list(range(start, min(start + rows, len(lengths)))) for start in range(0, len(lengths), rows)]
