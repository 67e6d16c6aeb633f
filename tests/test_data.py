"""Rows → text → tokens and labels: exactly the assistant's words are learned."""

import json
from pathlib import Path
from typing import Any

import pytest

from fasttune.data import arithmetic, formats, sources, tokens
from fasttune.errors import DataError

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, <|im_start|>assistant you?"},  # a marker inside the text
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def learned(result: tokens.Tokenized, tokenizer: Any, row: int = 0) -> str:
    return tokenizer.decode([label for label in result.labels[row] if label != tokens.IGNORE])


def test_arithmetic_is_seeded_and_its_answers_are_right() -> None:
    rows = arithmetic.generate("train", seed=3, rows=500)
    assert rows == arithmetic.generate("train", seed=3, rows=500) != arithmetic.generate("train", seed=4, rows=500)
    for row in rows:
        left, right = next(line for line in row["answer"].splitlines() if "=" in line).split(" = ")
        assert eval(left) == int(right) == int(arithmetic.final_number(row["answer"]) or "x")


def test_arithmetic_parts_share_no_sum() -> None:
    def sums(part: arithmetic.Part, seed: int) -> set[str]:
        return {row["answer"].splitlines()[1] for row in arithmetic.generate(part, seed=seed, rows=3000)}

    held_out = sums("test", 0) | sums("test", 1)
    assert len(held_out) > 100
    assert not held_out & (sums("train", 0) | sums("train", 1))


@pytest.mark.parametrize(
    ("text", "number"),
    [("so\n#### 1,234", "1234"), ("#### 5.", "5"), ("#### -3 dollars", "-3"), ("7", None), ("####", None)],
)
def test_final_number(text: str, number: str | None) -> None:
    assert arithmetic.final_number(text) == number


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"query": "q", "response": "a", "type": "t"}, "q", "a"),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"instruction": "q", "input": "more", "output": "a"}, "q\n\nmore", "a"),
        ({"instruction": "q", "input": "", "output": "a"}, "q", "a"),
    ],
)
def test_pairs_are_recognised_by_their_keys(row: dict, question: str, answer: str) -> None:
    expected = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert formats.conversation(row, 1) == expected


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"a": 1, "b": 2}, "row 7 has the columns a, b"),
        ({"question": 3, "answer": "a"}, "row 7: question is int"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "row 7: a turn needs a role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ],
)
def test_a_row_of_no_known_form_is_named(row: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        formats.conversation(row, 7)


def test_only_the_assistant_is_learned_to_its_end_of_turn(tiny_tokenizer: Any) -> None:
    result = tokens.tokenize([{"messages": CHAT}], tiny_tokenizer, 512)
    assert learned(result, tiny_tokenizer) == "Hello, <|im_start|>assistant you?<|im_end|>See you.<|im_end|>"
    whole = tokens.tokenize([{"messages": CHAT}], tiny_tokenizer, 512, train_on="all")
    assert learned(whole, tiny_tokenizer) == tiny_tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_plain_text_is_learned_whole_and_ends(tiny_tokenizer: Any) -> None:
    result = tokens.tokenize([{"text": "once upon"}], tiny_tokenizer, 512)
    assert learned(result, tiny_tokenizer) == "once upon<|im_end|>"


def test_a_base_model_gets_the_plain_template_with_one_bos(tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.chat_template = None
    bos = (tiny_tokenizer.bos_token, tiny_tokenizer.bos_token_id)
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert tokens.ensure_template(tiny_tokenizer)
    assert not tokens.ensure_template(tiny_tokenizer)
    result = tokens.tokenize([{"messages": CHAT[:1] + CHAT[3:]}, {"text": "abc"}], tiny_tokenizer, 512)
    assert learned(result, tiny_tokenizer) == "See you.<|im_end|>"
    assert all(ids[0] == bos[1] and ids.count(bos[1]) == 1 for ids in result.input_ids)


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ messages | length }}" + tiny_tokenizer.chat_template
    with pytest.raises(DataError, match="does not render prefixes consistently"):
        tokens.tokenize([{"messages": CHAT}], tiny_tokenizer, 512)


def test_long_rows_are_cut_or_dropped_and_counted(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "q", "completion": "a" * length} for length in (10, 400)]
    cut = tokens.tokenize(rows, tiny_tokenizer, 100)
    assert (len(cut), cut.truncated, max(map(len, cut.input_ids))) == (2, 1, 100)
    dropped = tokens.tokenize(rows, tiny_tokenizer, 100, too_long="drop")
    assert (len(dropped), dropped.too_long_dropped) == (1, 1)
    assert "1 too long, dropped" in dropped.summary()


def test_many_rows_without_a_label_are_an_error_that_shows_one(tiny_tokenizer: Any) -> None:
    good = [{"prompt": "q", "completion": "a"}] * 99
    bad = [{"prompt": "long question " * 40, "completion": "a"}]
    assert tokens.tokenize(good + bad, tiny_tokenizer, 100).unlabelled_dropped == 1
    with pytest.raises(DataError, match=r"6 of 105 rows have no trained token.*long question"):
        tokens.tokenize(good + bad * 6, tiny_tokenizer, 100)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path, ending: str) -> None:
    import pandas

    rows = arithmetic.generate("train", rows=5)
    path = tmp_path / f"rows.{ending}"
    frame = pandas.DataFrame(rows)
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        getattr(frame, f"to_{ending}")(path, index=False)
    assert sources.read(str(path), "train") == rows
    assert sources.read(str(path), "train", max_rows=2) == rows[:2]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2 is no valid JSON"):
        sources.read(str(path), "train")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere.jsonl", "no file nowhere.jsonl"),
        ("./nowhere", "no file"),
        ("builtin:poetry", "builtin:arithmetic"),
        ("pyproject.toml", "unknown ending"),
        ("configs", "is a folder"),
    ],
)
def test_a_source_that_cannot_be_is_refused_early(source: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        sources.check(source)


def test_an_empty_file_and_an_ignored_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    with pytest.raises(DataError, match="is empty"):
        sources.check(str(path))
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="would be ignored"):
        sources.check(str(path), split="test")
