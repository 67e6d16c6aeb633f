#!/usr/bin/env python3
"""How equal the parts of many GPUs are, simulated:  python benchmarks/balance.py CONFIG [key=value …]

Every step of an epoch is dealt out as a run would, 8 rows a rank. Printed for each number of ranks: the mean over the
most computed tokens of a rank (the efficiency that is left when ranks wait for each other), and beside it what it would
be if finished packs of `model.max_length` tokens were dealt out in place of rows.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fasttune import config as configuration
from fasttune.core import pretrained
from fasttune.data import load, sharing
from fasttune.data.batching import Batches

RANKS = (2, 4, 8, 16, 32, 64)
ROWS = 8  # of a rank, in a step


def by_rows(data: Batches) -> Iterator[float]:
    for step in range(data.steps_per_epoch - 1):  # the last one holds fewer rows
        packs = [sharing.tree(rows, data.least_shared) for rows in data.dealt(step)]
        yield share([sum(segment.tokens for segment in pack) for pack in packs])


def by_packs(data: Batches) -> Iterator[float]:
    for step in range(data.steps_per_epoch - 1):
        rows = [row for part in data.dealt(step) for row in part]
        lengths = [sum(segment.tokens for segment in pack) for pack in sharing.plan(rows, data.max_length, 0)]
        loads = [0] * data.ranks
        for length in sorted(lengths, reverse=True):
            loads[loads.index(min(loads))] += length
        yield share(loads)


def share(loads: list[int]) -> float:
    return statistics.mean(loads) / max(loads)


def main() -> int:
    config = configuration.load(Path(sys.argv[1]), sys.argv[2:])
    tokenizer = pretrained.read_tokenizer(config.model)
    data = load.encode(config, tokenizer, True, lambda *_: None)
    print(f"{'ranks':>5}  {'steps':>5}  {'rows dealt':>10}  {'packs dealt':>11}")
    for ranks in RANKS:
        dealt = replace(data, ranks=ranks, batch_rows=ROWS * ranks)
        rows, packs = statistics.mean(by_rows(dealt)), statistics.mean(by_packs(dealt))
        print(f"{ranks:>5}  {dealt.steps_per_epoch - 1:>5}  {rows:>10.3f}  {packs:>11.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
