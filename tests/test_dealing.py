"""Rows of a step on several processes: each row once, as equal as can be, and the same step on any number of them."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from test_sharing import related

from fasttune.data.dealing import deal
from fasttune.data.sharing import Encoded, tree


def alone(lengths: list[int]) -> list[Encoded]:
    return [(np.zeros(length, np.int32), np.ones(length, np.bool_)) for length in lengths]


@given(related(), st.integers(1, 6), st.sampled_from([0, 1, 8]))
def test_every_row_is_dealt_once(rows: list[Encoded], ranks: int, least: int) -> None:
    dealt = deal(tree(rows, least), ranks)
    assert len(dealt) == ranks and all(part == sorted(part) for part in dealt)
    assert sorted(row for part in dealt for row in part) == list(range(len(rows)))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 8))
def test_no_process_has_much_more_than_its_part(lengths: list[int], ranks: int) -> None:
    """Graham's bound: 4/3 of the best there is, which is at least the mean and the longest row."""
    loads = [sum(lengths[row] for row in part) for part in deal(tree(alone(lengths), 0), ranks)]
    best = max(sum(lengths) / ranks, max(lengths))
    assert max(loads) <= 4 / 3 * best + max(lengths) / 3


@pytest.mark.parametrize(("ranks", "least"), [(8, 0.97), (64, 0.96)])
def test_lengths_like_those_of_gsm8k_are_balanced(ranks: int, least: float) -> None:
    """Mean over most tokens of a rank, 50 steps of 8 rows a rank; log-normal lengths, as GSM8K's nearly are."""
    drawn = np.random.default_rng(0).lognormal(np.log(200), 0.4, (50, 8 * ranks)).astype(int)
    shares = []
    for lengths in drawn.tolist():
        loads = [sum(lengths[row] for row in part) for part in deal(tree(alone(lengths), 0), ranks)]
        shares.append(np.mean(loads) / max(loads))
    assert np.mean(shares) >= least


def behind(prompts: list[int], own: int) -> list[Encoded]:
    """A row of `own` tokens of its own behind each of these prompts of 300 tokens."""
    made = [
        np.concatenate([1000 * p + np.arange(300), 10**6 + 1000 * n + np.arange(own)]) for n, p in enumerate(prompts)
    ]
    return [(ids.astype(np.int32), np.arange(len(ids)) >= 310) for ids in made]


def test_what_begins_alike_stays_together() -> None:
    dealt = deal(tree(behind([1, 2, 1, 2, 1, 2], 130)), 2)
    assert dealt == [[0, 2, 4], [1, 3, 5]]


def test_a_large_group_is_parted_and_its_beginning_computed_twice() -> None:
    rows = behind([1] * 16, 130)
    dealt = deal(tree(rows), 2)
    assert [len(part) for part in dealt] == [8, 8]
    tokens = [sum(segment.tokens for segment in tree([rows[at] for at in part])) for part in dealt]
    assert tokens == [300 + 8 * 130] * 2
