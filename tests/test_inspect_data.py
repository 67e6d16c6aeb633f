"""`fasttune data`: figures that add up, masks as they are trained, and a page no data can steer."""

import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
from hypothesis import given, strategies
from rich.console import Console

from fasttune import cli, config, hardware, terminal
from fasttune.data import arithmetic, duplicates
from fasttune.data.batching import Batches
from fasttune.data.store import Rows
from fasttune.tools import data_page, estimate, inspect_data

CONFIG = """
name: looked-at
model: {name: builtin:tiny, max_length: 160}
data: {train: builtin:arithmetic}
train: {batch_rows: 4}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(rows: int, *overrides: str) -> inspect_data.DataFigures:
    return inspect_data.look(config.load("c.yaml", list(overrides)), rows, terminal.Reporter(quiet=True))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(figures: inspect_data.DataFigures, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    data_page.show(figures, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def encoded(lengths: list[int], **options: Any) -> Batches:
    """Rows of the ids 0, 1, 2, … of which the second half is learned."""
    learned = [np.arange(length) >= length // 2 for length in lengths]
    rows = Rows(
        source="rows.jsonl",
        ids=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        supervised=np.concatenate(learned),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        numbers=np.arange(1, len(lengths) + 1),
        counts=Counter(
            rows=len(lengths), kept=len(lengths), tokens=sum(lengths), supervised=int(np.concatenate(learned).sum())
        ),
    )
    chosen = {"batch_rows": 4, "micro_rows": 4, "max_length": 8, "eval_share": 0.0} | options
    return Batches([rows], [1.0], seed=0, packed=True, pad_id=0, **chosen)  # type: ignore[arg-type]


class Letters:
    """A tokenizer of the ids 0, 1, … as a, b, …"""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def measured(batches: Batches, rows: int = 0, **train: Any) -> inspect_data.DataFigures:
    settings = config.parse({"model": {"name": "m"}, "data": {"train": "rows.jsonl"}, "train": train})
    return inspect_data.measure(settings, Letters(), [], batches, rows, [], duplicates.of(batches.parts))


def test_the_command_shows_the_mask_of_its_rows(folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fasttune.cli", "data", "c.yaml"]
    options = ["--rows", "6", "model.max_length=512", "--json"]  # as people type it: an option before a key=value
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "| unsloth" not in done.stderr and "fasttune.tools.inspect_data" in done.stderr  # no model, so no unsloth
    goldens.contract("data --json", json.loads(done.stdout))
    shown = json.loads(done.stdout)["shown"]
    rows = arithmetic.generate("train", rows=2000)
    assert len({row["number"] for row in shown}) == 6
    for row in shown:
        source = rows[row["number"] - 1]
        (prompt, read), (answer, learned) = row["pieces"]
        assert (read, learned) == (False, True)
        assert prompt == f"<|im_start|>user\n{source['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert answer == f"{source['answer']}<|im_end|>"
        assert row["learned_tokens"] == len(source["answer"].encode()) + 1  # a byte a token, and the end of turn
        assert f"row {row['number']:,} of builtin:arithmetic · {row['tokens']:,} tokens" in done.stderr
        assert f"«{answer.splitlines()[0]}" in done.stderr and answer.splitlines()[-1] + "»" in done.stderr


def test_the_figures_of_the_command_add_up(folder: Path, unsloth: None, capsys: Any) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}" * (1 + i % 3)} for i in range(60)]
    rows[7]["answer"] = " "
    rows[9]["answer"] = "9" * 400
    write(folder / "rows.jsonl", rows)
    sets = "data.train={rows.jsonl: 1, builtin:arithmetic: 0.5}"
    assert cli.main(["data", "c.yaml", "--rows", "0", "--json", sets]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "rows as they are trained" not in err
    found = json.loads(out)
    own, builtin = found["data_sets"]
    assert (own["rows_read"], own["rows_kept"], own["rows_truncated"]) == (60, 59, 1)
    assert own["rows_dropped"] == {"empty answer": 1}
    assert (builtin["rows_read"], builtin["rows_kept"], builtin["weight"]) == (2000, 2000, 0.5)
    for key in ("tokens", "learned_tokens"):
        assert found[key] == own[key] + builtin[key]
    assert found["rows"] == 2059 == sum(each["rows"] for each in found["lengths"]["histogram"])
    assert found["rows_per_epoch"] == 59 + 1000 and found["steps_per_epoch"] == 265
    assert found["lengths"]["mean_tokens"] == pytest.approx(found["tokens"] / 2059)
    assert found["lengths"]["longest_tokens"] <= found["max_length_tokens"] == 160
    assert found["padding"]["packed_share"] == 0 < found["padding"]["padded_share"] < 1
    assert found["padding"]["steps"] == 100 and found["padding"]["rows_at_once"] == 4
    assert f"padded  {found['padding']['padded_share']:6.1%}" in err and "packed    0.0%" in err
    assert "1 row (1.7%) truncated: longer than model.max_length=160 tokens" in err
    assert "1 row (1.7%) dropped: empty answer" in err
    assert not {"c.yaml", "rows.jsonl"} ^ {path.name for path in folder.iterdir()}


def test_padding_is_counted_in_the_micro_batches() -> None:
    found = measured(encoded([4, 2, 3, 3])).padding
    assert (found.steps, found.rows_at_once, found.padded_share, found.packed_share) == (1, 4, 0.25, 0)
    assert measured(encoded([4, 2, 3, 3], micro_rows=1)).padding.padded_share == 0
    alike = encoded([20] * 4, max_length=40, least_shared=8)  # what a pack computes once is no padding below zero
    assert (measured(alike).padding.padded_share, measured(alike).padding.packed_share) == (0, 0)


def test_no_more_steps_are_laid_out_than_the_run_has() -> None:
    assert measured(encoded([3] * 40)).padding.steps == 10
    assert measured(encoded([3] * 40), max_steps=2).padding.steps == 2
    assert measured(encoded([3] * 40), epochs=2).padding.steps == 20
    assert measured(encoded([3] * 4000)).padding.steps == estimate.SAMPLED_STEPS


def test_rows_at_once_are_those_a_run_here_would_take(
    folder: Path, unsloth: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = inspect_data.replace(hardware.detect(), gpus=())
    monkeypatch.setattr(inspect_data.hardware, "detect", lambda: here)
    changes = ["train.batch_rows=16", "model.max_length=1024", "data.max_rows=32"]
    assert look(0, *changes).padding.rows_at_once == 2  # a CPU gains nothing beyond 2,048 tokens
    assert look(0, *changes, "train.micro_batch_rows=8").padding.rows_at_once == 8


@given(strategies.lists(strategies.integers(1, 5000), min_size=1, max_size=300))
def test_every_length_is_in_one_bin(lengths: list[int]) -> None:
    found = inspect_data._lengths(np.array(lengths))
    bins = found.histogram
    assert 1 <= len(bins) <= 10
    for each in bins:
        assert each.rows == sum(each.from_tokens <= length <= each.to_tokens for length in lengths)
    assert sum(each.rows for each in bins) == len(lengths)
    assert all(a.to_tokens + 1 == b.from_tokens for a, b in pairwise(bins))
    assert (found.shortest_tokens, found.longest_tokens) == (min(lengths), max(lengths))


def test_the_first_token_is_read_only_even_where_all_is_learned(folder: Path, unsloth: None) -> None:
    write(folder / "rows.jsonl", [{"text": "x" * (8 + i)} for i in range(8)])
    found = look(8, "data.train=rows.jsonl")
    assert found.learned_tokens == found.tokens - 8 == sum(row.learned_tokens for row in found.shown)
    for row in found.shown:
        assert row.pieces == [("x", False), ("x" * (6 + row.number) + "<|im_end|>", True)]


def test_data_cannot_steer_the_terminal(folder: Path, unsloth: None) -> None:
    write(folder / "rows.jsonl", [{"question": "a\x1b[31m [bold]q[/bold]\r\u202e", "answer": "b\x07\tc\nd"}])
    text = page(look(1, "data.train=rows.jsonl"))
    assert "a⟨U+001B⟩[31m [bold]q[/bold]⟨U+000D⟩⟨U+202E⟩" in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "«b⟨U+0007⟩" in text


def test_colour_or_marks_set_apart_what_is_learned() -> None:
    figures = measured(encoded([6]), rows=1)
    assert figures.shown[0].pieces == [("abc", False), ("def", True)]
    coloured = page(figures, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[2mabc\x1b[0m\x1b[1;32mdef\x1b[0m" in coloured and "«" not in coloured
    assert "\x1b[1;32msupervised\x1b[0m" in coloured  # the legend
    for plain in (page(figures), page(figures, force_terminal=True, color_system="standard", no_color=True)):
        assert "«def»" in plain and "\x1b[32m" not in plain and "1;32" not in plain
        assert "«supervised» stands between these marks" in plain


def test_what_is_dropped_split_and_held_out_is_told(folder: Path, unsloth: None) -> None:
    rows = [{"question": "q", "answer": "a" * (300 if i < 3 else 20)} for i in range(10)]
    write(folder / "rows.jsonl", rows)
    dropped = look(0, "data.train=rows.jsonl", "data.too_long=drop", "data.eval_share=0.3")
    (one,) = dropped.data_sets
    assert (one.rows_read, one.rows_kept, one.rows_too_long, one.rows_held_out) == (10, 7, 3, 2)
    assert dropped.rows_per_epoch == 5 and "2 of them held out" in page(dropped)
    assert "3 rows (30.0%) dropped: longer than model.max_length=160" in page(dropped)
    split = look(20, "data.train=rows.jsonl", "data.too_long=split")
    (one,) = split.data_sets
    assert one.rows_split == 3 and one.rows_kept > 10 and "split into pieces" in page(split)
    assert sum(row.learned_tokens for row in split.shown) == one.learned_tokens == 3 * 301 + 7 * 21


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.train=nowhere.jsonl"], "no file nowhere.jsonl"),
        (["model.name=builtin:large"], "builtin:tiny"),
        (["--rows", "-1"], "--rows -1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(folder: Path, arguments: list[str], told: str, capsys: Any) -> None:
    assert cli.main(["data", "c.yaml", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and told in err


def test_a_broken_line_is_named(folder: Path, unsloth: None, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert cli.main(["data", "c.yaml", "data.train=rows.jsonl", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("fasttune: data: rows.jsonl line 2 is no valid JSON")


def test_documents_end_to_end_are_called_documents_and_show_what_became_of_words() -> None:
    found = {"splits": 3, "wasted attempts": 1}
    split = inspect_data.Tokenization("patok", 20, 23, found, {"-an": 2}, [(["bah", "ay"], ["ba", "h", "ay"])])
    figures = replace(measured(encoded([4, 2, 3, 3])), layout="concat", tokenization=split)
    told = " ".join(page(figures, no_color=True).split())
    assert "4 documents read, 4 kept · 12 tokens" in told and "every document is whole" in told
    assert "a token sees its own document only" in told and "packing is" not in told
    assert "all that stands before it" in " ".join(page(replace(figures, cross_document=True)).split())
    assert "3 tokens split in two" in told and "affixes cut at: -an 2" in told and "bah·ay → ba·h·ay" in told
