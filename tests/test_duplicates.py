"""Rows that come more than once: found by their tokens, in and across data sets, and left out where that is asked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fasttune import cli, config
from fasttune.core import pretrained
from fasttune.data import chat, duplicates, load
from fasttune.data.batching import Batches
from fasttune.data.store import Rows

Whole = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a prompt, and of its answer
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)
SETS = st.lists(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12), min_size=1, max_size=3)


def encoded(rows: list[Whole], piece: int) -> Rows:
    """Rows whose tokens, with one in front of each row, are cut into pieces of `piece`."""
    ids, supervised, lengths, numbers = list[int](), list[bool](), list[int](), list[int]()
    for number, (prompt, answer) in enumerate(rows, 1):
        whole = [9, *prompt, *answer]
        ids += whole
        supervised += [at > len(prompt) for at in range(len(whole))]
        lengths += [len(whole[at : at + piece]) for at in range(0, len(whole), piece)]
        numbers += [number] * -(-len(whole) // piece)
    starts = np.cumsum([0, *lengths])
    return Rows("x", np.array(ids, np.int32), np.array(supervised), starts, np.array(numbers), Counter())


def counted(sets: list[list[Whole]]) -> list[tuple[int, int, int, int, list[int]]]:
    """What duplicates.of should find, by the definition."""
    seen: dict[Any, int] = {}
    found = []
    for part, rows in enumerate(sets):
        counts, numbers = [0, 0, 0, 0], []
        for number, (prompt, answer) in enumerate(rows, 1):
            for at, key in ((0, prompt + answer), (2, ("prompt", prompt))):
                first = seen.setdefault(key, part)
                again = (key, "seen") in seen
                seen[(key, "seen")] = 0
                counts[at] += again
                counts[at + 1] += again and first != part
                numbers += [number] if again and at == 0 else []
        found.append((*counts, numbers))
    return found


@given(SETS)
def test_they_are_what_a_person_would_count(sets: list[list[Whole]]) -> None:
    found = duplicates.of([encoded(rows, 100) for rows in sets])
    names = ("rows", "rows_elsewhere", "prompts", "prompts_elsewhere")
    assert [(*(getattr(each, name) for name in names), each.numbers.tolist()) for each in found] == counted(sets)


@given(SETS, st.integers(1, 3))
def test_the_pieces_of_a_split_row_are_one_row(sets: list[list[Whole]], piece: int) -> None:
    whole, split = (duplicates.of([encoded(rows, length) for rows in sets]) for length in (100, piece))
    assert [each.numbers.tolist() for each in split] == [each.numbers.tolist() for each in whole]


@given(SETS, st.sampled_from([0.0, 0.3]))
def test_what_is_left_is_trained_on_or_held_out_once(sets: list[list[Whole]], share: float) -> None:
    parts = [encoded(rows, 100) for rows in sets]
    dropped = [each.numbers for each in duplicates.of(parts)]
    sizes: dict[str, int] = {"seed": 1, "batch_rows": 2, "micro_rows": 2, "max_length": 8, "pad_id": 0}
    batches = Batches(parts, [1.0] * len(parts), eval_share=share, packed=True, dropped=dropped, **sizes)  # type: ignore
    rows = [(part, row) for part, (trained, held) in enumerate(batches.split) for row in (*trained, *held)]
    texts = [parts[part].row(row)[0].tobytes() for part, row in rows]
    assert len(texts) == len(set(texts)) == len({prompt + answer for each in sets for prompt, answer in each})
    assert len(texts) == len(set(rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """c.yaml, and two files: three rows of the second one repeat those of the first, and one its own."""
    monkeypatch.chdir(tmp_path)
    first = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(20)]
    second = [*first[:3], *({"question": f"{i}?", "answer": f"{i}."} for i in range(15, 40))]
    second.append(second[-1])
    for name, rows in (("a", first), ("b", second)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = "model: {name: builtin:tiny, max_length: 256}\nlora: {rank: 4}\ntrain: {batch_rows: 8}\n"
    (tmp_path / "c.yaml").write_text(tree + "data: {train: {a.jsonl: 1, b.jsonl: 2}, eval_share: 0.25}\n")
    return tmp_path


@pytest.mark.usefixtures("unsloth")
def test_the_command_counts_them_and_says_what_leaves_them_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "c.yaml", "--rows", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    all_kept = json.loads(out)["data_sets"]
    again = [
        [each[name] for name in each if "again" in name or "dedup" in name] for each in json.loads(out)["data_sets"]
    ]
    assert again == [[0, 0, 0, 0, 0], [4, 3, 9, 8, 0]]
    told = " ".join(err.split())
    assert "4 rows (13.8%), 3 of them of a data set above, repeat prompt and answer of an earlier row" in told
    assert "data.deduplicate=true leaves them out" in told
    assert "5 rows (17.2%), 5 of them of a data set above, repeat the prompt of an earlier row with another" in told
    assert cli.main(["data", "c.yaml", "--rows", "0", "--json", "data.deduplicate=true"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [each["rows_deduplicated"] for each in found["data_sets"]] == [0, 4]
    kept = [each["rows_kept"] for each in found["data_sets"]]
    assert kept == [all_kept[0]["rows_kept"], all_kept[1]["rows_kept"] - 4]
    for name in ("tokens", "learned_tokens"):  # those of the copies are no tokens of the run
        assert found["data_sets"][0][name] == all_kept[0][name] > all_kept[1][name] - found["data_sets"][1][name] > 0
    assert found["rows_per_epoch"] == (20 - 5) + 2 * (25 - 6), (
        "the first data set keeps its rows; a quarter is held out"
    )
    assert "left out: data.deduplicate" in " ".join(err.split())


def batches(folder: Path, *changes: str) -> Batches:
    asked = config.load(folder / "c.yaml", list(changes))
    tokenizer = pretrained.read_tokenizer(asked.model)
    chat.complete(tokenizer)
    return load.encode(asked, tokenizer, True, lambda *_: None)


def test_documents_are_left_out_whatever_way_their_tokens_are_split(folder: Path) -> None:
    texts = [f"a text of its own, the one with the number {i}" for i in range(9)]
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:4]]))
    how = ("data={train: d.jsonl, layout: concat, tokenization: stochastok, stochastok_p: 1}",)
    for deduplicate, documents in (("false", 13), ("true", 9)):
        made = batches(folder, *how, f"data.deduplicate={deduplicate}", "data.max_rows=100")
        assert sum(len(trained) for trained, _ in made.split) == documents
        assert ("4 left out, copies of earlier ones" in load.describe(made)[0]) == (deduplicate == "true")
        prefix = folder / deduplicate
        options = [*how, f"data.deduplicate={deduplicate}", "--json"]
        assert cli.main(["tokenize", "c.yaml", "--out", str(prefix), *options]) == 0
        from fasttune.data import megatron

        assert len(megatron.read(f"{prefix}.bin")) == documents
