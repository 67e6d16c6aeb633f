"""Order, packs and micro-batches: nothing is lost, doubled or leaked; a step has the same rows in every layout."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fasttune.data import load
from fasttune.data.batching import Batches, epoch_order
from fasttune.data.sharing import Encoded, best_fit, flat, padded
from fasttune.data.store import Rows
from fasttune.data.tokenize import IGNORE

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=120)


SIZES_AND_WEIGHTS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.1, 0.5, 1.0, 1.7, 2.0])), min_size=1)


def rows(lengths: list[int], seed: int = 0, numbers: list[int] | None = None) -> Rows:
    """Rows of random tokens, about half of them learned; every row learns its last token."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    learned = rng.random(total) < 0.5
    learned[starts[1:] - 1] = True
    ids = rng.integers(3, 1000, total, dtype=np.int32)
    found = np.array(numbers if numbers is not None else range(1, len(lengths) + 1), np.int64)
    return Rows("rows.jsonl", ids, learned, starts, found, Counter())


def batches(parts: list[Rows], **changed: Any) -> Batches:
    settings: dict[str, Any] = {
        "weights": [1.0] * len(parts),
        "seed": 7,
        "eval_share": 0.0,
        "batch_rows": 4,
        "micro_rows": 2,
        "max_length": 64,
        "packed": True,
        "pad_id": 0,
    }
    return Batches(parts, **(settings | changed))


def test_rows_of_one_length_are_a_plain_rectangle() -> None:
    """Without row lengths and mask, which would keep Unsloth from compiling its blocks."""
    same = batches([rows([30] * 4)], batch_rows=4).micro_batches(0)
    assert [(set(batch), batch["input_ids"].shape) for batch in same] == [({"input_ids", "labels"}, (4, 30))]
    assert (same[0]["labels"][:, 0] == -100).all(), "no row's first token is a target"
    (mixed,) = batches([rows([30, 30, 30, 31])], batch_rows=4).micro_batches(0)
    assert mixed["input_ids"].shape == (1, 121) and sorted(mixed["packed_seq_lengths"].tolist()) == [30, 30, 30, 31]


def test_steps_of_a_run() -> None:
    data = batches([rows([9] * 40)])
    assert [data.total_steps(epochs, None) for epochs in (1, 1.1, 0.05, 1.11)] == [10, 11, 1, 12]
    assert data.total_steps(1.1, None, scale=5.0) == 55  # 1.1 * 50 is a little more
    assert data.total_steps(1, None, scale=1.1) == 11
    assert data.total_steps(3, 7) == 7


def learned_rows(micro_batches: list[dict[str, Any]]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of every row in a step, whatever its layout."""
    found = []
    for batch in micro_batches:
        if "packed_seq_lengths" in batch:
            ends = np.cumsum(batch["packed_seq_lengths"])[:-1]
            found += zip(np.split(batch["input_ids"][0], ends), np.split(batch["labels"][0], ends), strict=True)
        else:
            kept = batch.get("attention_mask", np.ones_like(batch["input_ids"])).astype(bool)
            found += [(i[k], at[k]) for i, at, k in zip(batch["input_ids"], batch["labels"], kept, strict=True)]
    return Counter((tuple(map(int, ids)), tuple(map(int, labels))) for ids, labels in found)


@given(LENGTHS, st.integers(50, 400))
def test_best_fit_holds_every_row_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert packs == best_fit(list(lengths), capacity)
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    smallest, second = sorted([*sizes, capacity, capacity])[:2]
    assert len(packs) == 1 or smallest + second > capacity  # no two packs could be one


def test_best_fit_takes_the_fullest_pack_with_room() -> None:
    assert best_fit([60, 50, 40, 50], 100) == [[0, 2], [1, 3]]
    assert best_fit([7, 6, 3, 4, 10, 11], 10) == [[5], [4], [0, 2], [1, 3]]


def test_packs_of_lengths_like_gsm8k_are_97_percent_full() -> None:
    rng = np.random.default_rng(0)
    drawn = np.clip(rng.lognormal(np.log(204), 0.34, 7473), 60, 512).astype(int).tolist()
    assert 212 < np.mean(drawn) < 220
    assert sum(drawn) / (2048 * len(best_fit(drawn, 2048))) >= 0.97


@given(SIZES_AND_WEIGHTS, st.integers(0, 2**32), st.integers(0, 5))
def test_each_row_is_seen_as_often_as_its_weight(sets: list[tuple[int, float]], seed: int, epoch: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    order = epoch_order(sizes, weights, seed, epoch)
    assert len(order) == batches([rows([9] * size) for size in sizes], weights=weights).rows_per_epoch
    seen, first = Counter(order.tolist()), 0
    for size, weight in sets:
        times = [seen.pop(row, 0) for row in range(first, first + size)]
        assert all(int(weight) <= count <= int(weight) + (weight % 1 > 0) for count in times)
        assert sum(times) == size * int(weight) + round(size * (weight % 1))
        first += size
    assert not seen


def test_the_order_is_seeded_and_new_in_each_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order([40, 60], [0.5, 1.0], seed, epoch).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert set(order(1, 0)) != set(order(1, 1))  # another half of the first set
    assert order(1, 0) != sorted(order(1, 0))


@given(
    st.lists(st.lists(st.integers(2, 64), min_size=1, max_size=30), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_an_epoch_has_every_row_once_packed_or_padded(
    parts: list[list[int]], batch_rows: int, micro_rows: int, seed: int
) -> None:
    made = [rows(lengths, part) for part, lengths in enumerate(parts)]
    packed = batches(made, batch_rows=batch_rows, micro_rows=micro_rows, seed=seed)
    other = batches(made, batch_rows=batch_rows, micro_rows=micro_rows, seed=seed, packed=False)
    chosen = [packed.rows_of(step) for step in range(packed.steps_per_epoch)]
    everything = [(part, row) for part, lengths in enumerate(parts) for row in range(len(lengths))]
    assert sorted(pair for step in chosen for pair in step) == everything
    assert {len(step) for step in chosen[:-1]} <= {batch_rows}
    for step in range(packed.steps_per_epoch):
        flats, rectangles = packed.micro_batches(step), other.micro_batches(step)
        assert all(batch["input_ids"].shape[1] <= micro_rows * 64 for batch in flats)
        assert all(len(batch["input_ids"]) <= micro_rows for batch in rectangles)
        assert learned_rows(flats) == learned_rows(rectangles)
        assert learned_rows(flats).total() == len(chosen[step])


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    part = rows([5] * 30)
    forward, backward = batches([part]), batches([part])
    steps = list(range(3 * forward.steps_per_epoch))
    in_order = {step: forward.rows_of(step) for step in steps}
    assert {step: backward.rows_of(step) for step in reversed(steps)} == in_order
    assert batches([part], seed=8).rows_of(0) != in_order[0]
    first, second = (sorted(pair for step in range(8) for pair in in_order[e * 8 + step]) for e in (0, 1))
    assert first == second
    assert in_order[0] != in_order[8]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(0, 99))
def test_held_out_rows_are_never_trained(sizes: list[int], eval_share: float, seed: int) -> None:
    parts = [rows([3] * size) for size in sizes]
    made = batches(parts, eval_share=eval_share, seed=seed)
    trained = {pair for step in range(2 * made.steps_per_epoch) for pair in made.rows_of(step)}
    for part, (kept, held) in enumerate(made.split):
        assert sorted([*kept, *held]) == list(range(sizes[part]))
        assert len(held) == round(eval_share * sizes[part])
        assert {row for p, row in trained if p == part} == set(kept.tolist())


def test_the_pieces_of_a_split_row_are_held_out_together() -> None:
    part = rows([3] * 60, numbers=[number for number in range(1, 21) for _ in range(3)])
    kept, held = batches([part], eval_share=0.25).split[0]
    assert len(held) == 15
    assert not set(part.numbers[kept]) & set(part.numbers[held])


def test_flat_restarts_positions_and_learns_no_first_token() -> None:
    first = (np.array([5, 6, 7], np.int32), np.array([True, True, False]))
    second = (np.array([8, 9], np.int32), np.array([True, True]))
    batch = flat([first, second])
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[IGNORE, 6, IGNORE, IGNORE, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "packed_seq_lengths": [3, 2],
    }
    assert {name: array.tolist() for name, array in padded([first, second], 0).items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "labels": [[IGNORE, 6, IGNORE], [IGNORE, 9, IGNORE]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }


def row(ids: list[int], learned_from: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids, np.int32), np.arange(len(ids)) >= learned_from


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_longer_than_a_pack_still_trains(packed: bool) -> None:
    made = batches([rows([300, 4])], micro_rows=1, packed=packed)
    assert sum(learned_rows(made.micro_batches(0)).values()) == 2


def lettered(prompt: str, answer: str) -> Encoded:
    """A letter a token."""
    text = np.array([ord(letter) for letter in prompt + answer], np.int32)
    return text, np.arange(len(text)) >= len(prompt)


def of_rows(*rows: Encoded, eval_share: float = 0.0) -> Batches:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])])
    ids, learned = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    part = Rows("rows.jsonl", ids, learned, starts, np.arange(1, len(rows) + 1), Counter())
    return Batches([part], [1.0], 0, eval_share, batch_rows=4, micro_rows=4, max_length=64, packed=True, pad_id=0)


TRAINED = [lettered(f"What is {i}?", f"It is {i}.") for i in range(7)]


def test_copies_and_prompts_are_counted() -> None:
    held = [
        lettered("What is 3?", "It is 3."),
        lettered("What is 6?", "Six."),
        lettered("What is 9?", "It is 9."),
        lettered("What", " is 3?"),
    ]
    found = load.overlap(of_rows(*TRAINED), held)
    assert found is not None and found.startswith(
        "of 4 held-out rows 2 have a prompt that is trained on, 1 of them with"
    )
    assert load.overlap(of_rows(*TRAINED), held[2:]) is None


def test_plain_text_has_no_prompt_to_share() -> None:
    trained = of_rows(lettered("", "once upon a time"), lettered("", "the end"))
    assert load.overlap(trained, [lettered("", "once")]) is None
    found = load.overlap(trained, [lettered("", "once"), lettered("", "the end")])
    assert found is not None and "1 have a prompt that is trained on, 1 of them" in found


def test_only_rows_that_are_trained_on_count() -> None:
    made = of_rows(*TRAINED, eval_share=0.3)
    rows, (_, held) = made.parts[0], made.split[0]
    assert load.overlap(made, [rows.row(i) for i in held]) is None
    twice = of_rows(*TRAINED, *TRAINED, eval_share=0.3)
    rows, (trained, held) = twice.parts[0], twice.split[0]
    both = sum(any((i - j) % 7 == 0 for j in trained) for i in held)
    found = load.overlap(twice, [rows.row(i) for i in held])
    assert both and found is not None and f"{both} have a prompt that is trained on, {both} of them" in found
