"""Rows that begin alike: computed once, planned by what is computed, and every row and label still what it was."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fasttune.data import load
from fasttune.data.batching import Batches
from fasttune.data.sharing import Encoded, Segment, flat, paths, plan, tree
from fasttune.data.tokenize import IGNORE, labels


def row(ids: list[int], supervised_from: int, to: int | None = None) -> Encoded:
    at = np.arange(len(ids))
    return np.array(ids, np.int32), (at >= supervised_from) & (at < (len(ids) if to is None else to))


def shape(segments: list[Segment]) -> list[Any]:
    """(start, end, rows, what is below) of every segment."""
    return [(each.start, each.end, each.rows, shape(each.below)) for each in segments]


SYSTEM, ONE, TWO = list(range(100, 120)), list(range(200, 212)), list(range(300, 315))


def test_what_rows_have_in_common_is_a_tree() -> None:
    """A system prompt, below it two questions, below one of them two answers; and a row that has nothing of it."""
    rows = [
        row([*SYSTEM, *ONE, 1, 2, 3], 32),
        row([*SYSTEM, *TWO, 4], 35),
        row([9, 8, 7], 1),
        row([*SYSTEM, *ONE, 1, 5], 32),
    ]
    question = (20, 31, [0, 3], [(31, 35, [0], []), (31, 34, [3], [])])  # its last token predicts two first ones
    assert shape(tree(rows)) == [(0, 20, [0, 1, 3], [question, (20, 36, [1], [])]), (0, 3, [2], [])]
    assert shape(tree(rows, 0)) == [(0, len(ids), [at], []) for at, (ids, _) in enumerate(rows)]


def test_a_conversation_cut_at_each_answer_is_one_path() -> None:
    """An answer that is trained on in one row is only read in the next one: there it has its label once."""
    turns = [*SYSTEM, *ONE, *TWO]
    rows = [row(turns[:20], 10), row(turns[:32], 24), row(turns, 35)]
    assert shape(tree(rows)) == [(0, 20, [0, 1, 2], [(20, 32, [1, 2], [(32, 47, [2], [])])])]
    batch = flat(rows, tree(rows))
    assert batch["input_ids"].tolist() == [turns]
    assert int((batch["labels"] != IGNORE).sum()) == 10 + 8 + 12
    assert batch["segment_owners"].tolist() == [0, 1, 2] and batch["row_ends"].tolist() == [0, 1, 2]


def test_rows_that_are_the_same_share_what_comes_before_their_labels() -> None:
    same = list(range(20))
    twice = [(0, 14, [0, 1], [(14, 20, [0], []), (14, 20, [1], [])])]  # token 14 predicts 15, once for each row
    assert shape(tree([row(same, 15), row(same, 15)])) == twice
    assert shape(tree([row(same, 20), row(same, 20)])) == [(0, 20, [0, 1], [])]  # nothing supervised
    apart = [(0, 7, [0], []), (0, 7, [1], [])]
    assert shape(tree([row(same[:7], 6), row(same[:7], 6)])) == apart  # too few to gain from


def test_a_micro_batch_says_where_its_rows_are() -> None:
    batch = flat(
        [row([*SYSTEM, 1, 2, 3], 21), row([*SYSTEM, 4, 5], 21)],
        tree([row([*SYSTEM, 1, 2, 3], 21), row([*SYSTEM, 4, 5], 21)]),
    )
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[*SYSTEM, 1, 2, 3, 4, 5]],
        "labels": [[IGNORE] * 21 + [2, 3, IGNORE, 5]],
        "position_ids": [[*range(20), 20, 21, 22, 20, 21]],
        "packed_seq_lengths": [20, 3, 2],
        "segment_parents": [-1, 0, 0],
        "segment_owners": [-1, 0, 1],
        "row_ends": [1, 2],
    }


@st.composite
def related(draw: st.DrawFn) -> list[Encoded]:
    """No row or more, of few different tokens, most of which begin as another one does; a stretch is supervised."""
    made: list[Encoded] = []
    for _ in range(draw(st.integers(0, 9))):
        beginning = draw(st.sampled_from(made))[0].tolist() if made and draw(st.booleans()) else []
        ids = beginning[: draw(st.integers(0, len(beginning)))] + draw(st.lists(st.integers(0, 3), max_size=24))
        ids = ids or [1]
        start = draw(st.integers(0, len(ids)))
        made.append(row(ids, start, draw(st.integers(start, len(ids)))))
    return made


@given(related(), st.integers(1, 80))
def test_no_row_is_changed_and_no_pack_is_too_large(rows: list[Encoded], capacity: int) -> None:
    """Put together again, the rows of all packs are what they were, with their labels, each supervised token once."""
    found = []
    for segments in plan(rows, capacity):
        batch = flat(rows, segments)
        lengths = batch["packed_seq_lengths"].tolist()
        ids, targets, positions = (
            np.split(batch[name][0], np.cumsum(lengths)[:-1]) for name in ("input_ids", "labels", "position_ids")
        )
        owners = batch.get("segment_owners", np.arange(len(lengths)))
        assert all(label[0] == IGNORE for label in targets), "what predicts a segment's first token lies elsewhere"
        longest = 0
        for number, path in enumerate(paths(batch)):
            own = [targets[s] if owners[s] == number else np.full(lengths[s], IGNORE) for s in path]
            whole = np.concatenate([ids[s] for s in path])
            assert np.concatenate([positions[s] for s in path]).tolist() == list(range(len(whole)))
            found.append((whole.tolist(), np.concatenate(own).tolist()))
            longest = max(longest, len(whole))
        assert batch["input_ids"].size <= max(capacity, longest)
    assert sorted(found) == sorted((ids.tolist(), labels(ids, supervised).tolist()) for ids, supervised in rows)


@pytest.mark.parametrize("capacity,packs", [(4200, 1), (2048, 4), (1100, 16)])
def test_packs_are_planned_by_what_is_computed(capacity: int, packs: int) -> None:
    """16 rows behind a prompt of 880 tokens: 4,080 computed instead of 17,280."""
    rows = [row([*range(880), *range(1000 * (i + 1), 1000 * (i + 1) + 200)], 900) for i in range(16)]
    found = plan(rows, capacity)
    assert len(found) == packs
    assert sum(flat(rows, segments)["input_ids"].size for segments in found) == 880 * packs + 16 * 200


def test_a_label_is_in_the_pack_of_its_row_only() -> None:
    """A turn that one row is supervised in and four only read, in two packs: the second one has no label there."""
    beginning = [*SYSTEM, *ONE]
    rows = [row(beginning, 24)]
    rows += [row([*beginning, *range(1000 * (i + 1), 1000 * (i + 1) + 40)], 60) for i in range(4)]
    packs = [flat(rows, segments) for segments in plan(rows, 32 + 2 * 40)]
    assert sorted(len(batch["row_ends"]) for batch in packs) == [2, 3]
    assert sum(int((batch["labels"] != IGNORE).sum()) for batch in packs) == 8 + 4 * 12


def test_rows_of_one_prompt_are_put_together_and_prompts_are_shuffled() -> None:
    """Eight answers to each of 30 questions: every step of 16 rows is two whole questions, another two each epoch."""
    from collections import Counter

    from fasttune.data.store import Rows

    ids = np.array([[*SYSTEM, 100 + q, 1000 + a] for a in range(8) for q in range(30)], np.int32)
    learned = np.tile(np.arange(ids.shape[1]) == ids.shape[1] - 1, len(ids))
    starts = np.arange(len(ids) + 1) * ids.shape[1]
    part = Rows("rows.jsonl", ids.ravel(), learned, starts, np.arange(len(ids)), Counter())
    data = Batches([part], [1.0], 7, 0.0, 16, 1, 64, packed=True, pad_id=0, group_by_prompt=True)
    steps = [[tuple(data.parts[0].row(row)[0][-2:].tolist()) for _, row in data.rows_of(step)] for step in range(30)]
    assert all(len(set(step)) == 16 and len({question for question, _ in step}) == 2 for step in steps)
    epochs = [[question for step in steps[at : at + 15] for question, _ in step] for at in (0, 15)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert any("240 rows have 30 prompts" in line for line in load.describe(data))


def test_without_sharing_nothing_is_put_together() -> None:
    from collections import Counter

    from fasttune.data.store import Rows

    ids = np.tile(np.array([*SYSTEM, 1, 2], np.int32), 4)
    starts = np.arange(5) * 22
    part = Rows("rows.jsonl", ids, np.tile(np.arange(22) >= 21, 4), starts, np.arange(1, 5), Counter())
    data = Batches([part], [1.0], 7, 0.0, 4, 1, 64, packed=True, pad_id=0)
    assert sum(batch["input_ids"].size for batch in data.micro_batches(0)) == 88
    data.least_shared = 8
    assert sum(batch["input_ids"].size for batch in data.micro_batches(0)) == 20 + 4 * 2
