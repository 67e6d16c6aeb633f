"""Steps of a run: seeded order → the rows of each step → micro-batches as arrays. A step depends on the seed
and its number alone, so any step can be made at any time, by any process.

A step is always the same rows, packed or padded: packing decides only how they lie in memory.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from fasttune.data import sharing
from fasttune.data.sharing import Encoded, MicroBatch
from fasttune.data.store import Rows
from fasttune.data.tokenize import IGNORE

EMPTY: MicroBatch = {"input_ids": np.zeros((1, 2), np.int64), "labels": np.full((1, 2), IGNORE)}  # teaches nothing
HOLD_OUT_STREAM = 1 << 32  # keeps the hold-out draw apart from the epochs' shuffles


@dataclass
class Batches:
    """All steps of a run. `parts` are the data sets, with `weights` (see epoch_order).

    dropped: numbers of the rows of each that are neither trained on nor held out: copies, see data/duplicates.py.
    eval_share: share of each set's rows that is held out and never trained on.
    batch_rows: rows of a step, of all processes. micro_rows: full rows (of max_length tokens) that fit at once in one.
    least_shared: what rows of a pack begin with alike lies in it once, if it has this many tokens or more; 0: never.
    group_by_prompt: rows of one prompt come one after the other; groups are shuffled, not rows.
    rank, ranks: which process of the run this is, and of how many. in_step: each must have as many micro-batches.
    """

    parts: list[Rows]
    weights: list[float]
    seed: int
    eval_share: float
    batch_rows: int
    micro_rows: int
    max_length: int
    packed: bool
    pad_id: int
    least_shared: int = 0
    group_by_prompt: bool = False
    rank: int = 0
    ranks: int = 1
    in_step: bool = False
    dropped: list[np.ndarray] = field(default_factory=list)
    unit: ClassVar = "rows"  # what `parts` consist of, in a sentence

    @cached_property
    def split(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(trained, held-out) row indexes of each part, both in the order of the file.

        The pieces of a split row share its number and stay together.
        """
        found = []
        for part, rows in enumerate(self.parts):
            gone = np.isin(rows.numbers, self.dropped[part]) if self.dropped else np.zeros(len(rows), np.bool_)
            numbers = np.unique(rows.numbers[~gone])
            shuffled = np.random.default_rng([self.seed, HOLD_OUT_STREAM, part]).permutation(numbers)
            held = np.isin(rows.numbers, shuffled[: round(self.eval_share * len(numbers))])
            found.append((np.flatnonzero(~held & ~gone), np.flatnonzero(held)))
        return found

    @cached_property
    def sizes(self) -> list[int]:
        return [len(trained) for trained, _ in self.split]

    @cached_property
    def prompts(self) -> np.ndarray:
        """The number of its prompt, of each row that is trained on."""
        sets = zip(self.parts, self.split, strict=True)
        return sharing.prompts(rows.row(row) for rows, (trained, _) in sets for row in trained)

    @property
    def rows_per_epoch(self) -> int:
        """How many rows `epoch_order` gives."""
        sets = zip(self.sizes, self.weights, strict=True)
        return sum(size * int(weight) + round((weight % 1.0) * size) for size, weight in sets)

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may hold fewer rows."""
        return math.ceil(self.rows_per_epoch / self.batch_rows)

    def total_steps(self, epochs: float, max_steps: int | None, scale: float = 1.0) -> int:
        """Steps of a run of `epochs`, or `max_steps`; `scale`: rows of an epoch over those that are here."""
        if max_steps is not None:
            return max_steps
        # Rounded first: 1.1 * 50 is a little more than 55.
        per_epoch = math.ceil(round(scale * self.rows_per_epoch / self.batch_rows, 9))
        return math.ceil(round(epochs * per_epoch, 9))

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """(part, row) of every row of a step, from 0."""
        return [(part, int(self.split[part][0][at])) for part, at in self.chosen(step)]

    def chosen(self, step: int) -> list[tuple[int, int]]:
        """(part, the how manieth of those that are trained on) of every row of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = self.order(epoch)[within * self.batch_rows : (within + 1) * self.batch_rows]
        firsts = np.cumsum([0, *self.sizes])
        parts = np.searchsorted(firsts, chosen, side="right") - 1
        return [(int(part), int(at - firsts[part])) for part, at in zip(parts, chosen, strict=True)]

    def order(self, epoch: int) -> np.ndarray:
        """As `epoch_order`."""
        if epoch != getattr(self, "_epoch", None):
            order = epoch_order(self.sizes, self.weights, self.seed, epoch)
            self._epoch, self._order = epoch, sharing.together(order, self.prompts) if self.group_by_prompt else order
        return self._order

    def lengths(self, part: int) -> np.ndarray:
        """Tokens of each row of a part that is trained on."""
        return self.parts[part].lengths[self.split[part][0]]

    def describe(self, step: int) -> str:
        """The rows of a step as a person finds them: rows 12, 40 of rows.jsonl."""
        found: dict[str, list[int]] = {}
        for source, number, _ in self.items(step):
            found.setdefault(source, []).append(number)
        return "; ".join(f"rows {', '.join(map(str, sorted(rows)))} of {source}" for source, rows in found.items())

    def tokens_of(self, step: int) -> int:
        """Tokens of all rows of a step, each counted by itself."""
        return sum(len(ids) for ids, _ in self.encoded(step))

    def encoded(self, step: int) -> list[Encoded]:
        """The rows of a step."""
        return [row for _, _, rows in self.items(step) for row in rows]

    def items(self, step: int) -> list[tuple[str, int, list[Encoded]]]:
        """(source, number there, what it consists of) of every row of a step."""
        parts = ((self.parts[part], row) for part, row in self.rows_of(step))
        return [(rows.source, int(rows.numbers[row]), [rows.row(row)]) for rows, row in parts]

    def computed_tokens(self, steps: int, micro_rows: int) -> int:
        """Tokens that the first `steps` steps compute on all processes, with `micro_rows` full rows at once."""
        found = 0
        for rows in (rows for step in range(steps) for rows in self.dealt(step)):
            packs = sharing.plan(rows, micro_rows * self.max_length, self.least_shared)
            found += sum(segment.tokens for pack in packs for segment in pack)
        return found

    def dealt(self, step: int) -> list[list[Encoded]]:
        """The rows of a step that each process trains on."""
        rows = self.encoded(step)
        if self.ranks == 1:
            return [rows]
        from fasttune.data import dealing

        whole = sharing.tree(rows, self.least_shared)  # without sharing their lengths are enough: no other row is read
        return [[rows[at] for at in part] for part in dealing.deal(whole, self.ranks)]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This process's part of a step as micro-batches: packs, or padded rectangles (B, T) of a model that cannot be
        packed. There may be none. With `in_step` there are as many as any process has; those too many have no labels.
        """
        if not self.in_step:
            return self._laid_out(self.dealt(step)[self.rank])
        everyone = self.laid_out(step)
        own, most = everyone[self.rank], max(map(len, everyone))
        return own + [EMPTY] * (most - len(own))

    def laid_out(self, step: int) -> list[list[MicroBatch]]:
        """The micro-batches of every process."""
        return [self._laid_out(rows) for rows in self.dealt(step)]

    def _laid_out(self, rows: list[Encoded]) -> list[MicroBatch]:
        if self.packed:
            packs = sharing.plan(rows, self.micro_rows * self.max_length, self.least_shared)
            return [sharing.pack(rows, segments) for segments in packs]
        return [
            sharing.padded(rows[at : at + self.micro_rows], self.pad_id) for at in range(0, len(rows), self.micro_rows)
        ]


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
