"""Held-out rows that are trained on are counted, whatever the form and order of the files."""

from collections import Counter

import numpy as np
import pytest

from fasttune.data import overlap
from fasttune.data.batching import Batches, Encoded
from fasttune.data.store import Rows


def row(prompt: str, answer: str) -> Encoded:
    """A letter a token."""
    text = np.array([ord(letter) for letter in prompt + answer], np.int32)
    return text, np.arange(len(text)) >= len(prompt)


def batches(*rows: Encoded, eval_share: float = 0.0) -> Batches:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])])
    ids, learned = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    part = Rows("rows.jsonl", ids, learned, starts, np.arange(1, len(rows) + 1), Counter())
    return Batches([part], [1.0], 0, eval_share, batch_rows=4, micro_rows=4, max_length=64, packed=True, pad_id=0)


TRAINED = [row(f"What is {i}?", f"It is {i}.") for i in range(7)]


@pytest.mark.parametrize("at_once", [2, 10_000])
def test_copies_and_prompts_are_counted(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "ROWS_AT_ONCE", at_once)
    held = [
        row("What is 3?", "It is 3."),
        row("What is 6?", "Six."),
        row("What is 9?", "It is 9."),
        row("What", " is 3?"),
    ]
    found = overlap.warning(batches(*TRAINED), held)
    assert found is not None and found.startswith(
        "of 4 held-out rows 2 have a prompt that is trained on, 1 of them with"
    )
    assert overlap.warning(batches(*TRAINED), held[2:]) is None


def test_plain_text_has_no_prompt_to_share() -> None:
    trained = batches(row("", "once upon a time"), row("", "the end"))
    assert overlap.warning(trained, [row("", "once")]) is None
    found = overlap.warning(trained, [row("", "once"), row("", "the end")])
    assert found is not None and "1 have a prompt that is trained on, 1 of them" in found


def test_only_rows_that_are_trained_on_count() -> None:
    made = batches(*TRAINED, eval_share=0.3)
    rows, (_, held) = made.parts[0], made.split[0]
    assert overlap.warning(made, [rows.row(i) for i in held]) is None
    twice = batches(*TRAINED, *TRAINED, eval_share=0.3)
    rows, (trained, held) = twice.parts[0], twice.split[0]
    both = sum(any((i - j) % 7 == 0 for j in trained) for i in held)
    found = overlap.warning(twice, [rows.row(i) for i in held])
    assert both and found is not None and f"{both} have a prompt that is trained on, {both} of them" in found
