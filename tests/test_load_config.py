"""What a config says is read, from files and from the hub: forms, columns, weights, held-out rows, revisions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fasttune import config, terminal
from fasttune.data import arithmetic, load
from fasttune.errors import DataError
from fasttune.tools import inspect_data, plan
from tests.test_load import EMPTY, GOOD, entries, write


def settings(train: Any, **data: Any) -> config.Config:
    return config.parse({"model": {"name": "builtin:tiny", "max_length": 512}, "data": {"train": train, **data}})


def encode(tokenizer: Any, train: Any, **data: Any) -> Any:
    return load.encode(settings(train, **data), tokenizer, True, lambda what, share: None)


def test_the_config_decides_what_is_read(tmp_path: Path, cache: Path, tiny_tokenizer: Any) -> None:
    first = write(tmp_path / "a.jsonl", arithmetic.generate("train", rows=40))
    second = write(tmp_path / "b.jsonl", [{"text": "once upon a time"}] * 10)
    made = encode(tiny_tokenizer, {first: 1.0, second: 2.0}, eval_share=0.1)
    assert made.sizes == [36, 9]
    assert made.rows_per_epoch == 36 + 18
    assert "40 rows" in load.describe(made)[0]
    assert "4 held out" in load.describe(made)[0]
    assert "2 × an epoch; 1 held out" in load.describe(made)[1]
    limited = encode(tiny_tokenizer, first, max_rows=7)
    assert limited.parts[0].numbers.tolist() == list(range(1, 8))
    renamed = write(tmp_path / "c.jsonl", [{"problem": "q", "solution": "a"}])
    assert len(encode(tiny_tokenizer, renamed, columns={"question": "problem", "answer": "solution"}).parts[0]) == 1
    said = load.describe(encode(tiny_tokenizer, write(tmp_path / "d.jsonl", [GOOD] * 99 + [EMPTY])))
    assert said[0].endswith("1 dropped: empty answer")


@pytest.mark.parametrize(
    ("rows", "data", "told"),
    [
        ([{"a": 1}], {}, "line 1 has the columns a"),
        ([GOOD, {"text": "x"}], {}, "line 2 has no question and no answer"),
        ([GOOD], {"format": "text"}, "line 1 has no text"),
        ([GOOD], {"columns": {"question": "problem"}}, "line 1 has no problem"),
        ([GOOD], {"eval_share": 0.9}, "leaves no row to train on"),
        ([GOOD] * 3 + [EMPTY], {}, "1 of 4 rows"),
    ],
)
def test_a_wrong_file_is_one_clear_line(
    tmp_path: Path, cache: Path, tiny_tokenizer: Any, rows: list[dict[str, Any]], data: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told) as caught:
        encode(tiny_tokenizer, write(tmp_path / "rows.jsonl", rows), **data)
    assert "\n" not in str(caught.value)


def held_out(tokenizer: Any, asked: config.Config) -> Any:
    made = load.encode(asked, tokenizer, True, lambda what, share: None)
    found, warnings = load.held_out(asked, tokenizer, made, lambda what, share: None)
    return [row for rows in found.values() for row in rows], warnings


def test_each_source_has_its_own_form_and_columns(tmp_path: Path, cache: Path, tiny_tokenizer: Any) -> None:
    messages = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    talk = write(tmp_path / "talk.jsonl", messages * 4)
    good = write(tmp_path / "good.jsonl", [GOOD] * 3)
    mapped = write(tmp_path / "mapped.jsonl", [{"problem": "q", "solution": "a"}] * 3)
    columns = {"question": "problem", "answer": "solution"}
    for train, data, form in (
        (talk, {"eval": good}, "auto"),  # written out, it would be the form of the held-out rows too
        (talk, {"eval": good, "format": "messages"}, "messages"),
        (mapped, {"eval": good, "columns": columns}, "question_answer"),
        (mapped, {"eval": talk, "columns": columns}, "auto"),
        ({talk: 1.0, mapped: 1.0}, {"eval": good, "columns": columns}, "auto"),
        (talk, {"eval": "builtin:arithmetic"}, "auto"),
    ):
        asked = settings(train, **data)
        resolved = load.with_format(asked)
        assert resolved.data.format == form
        rows, warnings = held_out(tiny_tokenizer, resolved)
        copies = "builtin" not in data["eval"]
        assert (len(rows), len(warnings)) == ({good: 3, talk: 4}.get(data["eval"], 64), copies)
        same = len(rows)
        assert not copies or warnings[0].startswith(
            f"of {same} held-out rows {same} have a prompt that is trained on, {same}"
        )
        from fasttune.core import evaluation

        resolved.samples = 2
        made = load.encode(resolved, tiny_tokenizer, True, lambda what, share: None)
        assert [problem.reference for problem in evaluation.problems_of(resolved, tiny_tokenizer, made, print)][
            :1
        ] != []


def test_problems_that_are_asked_are_compared_too(tmp_path: Path, cache: Path, tiny_tokenizer: Any) -> None:
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(6)]
    trained, held = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    tree = {"model": {"name": "builtin:tiny"}, "data": {"train": trained, "eval": held}}
    measured, warnings = held_out(tiny_tokenizer, config.parse(tree | {"eval": {"every": "never", "problems": 5}}))
    assert measured == [] and warnings[0].startswith("of 5 held-out rows 5")
    measured, warnings = held_out(tiny_tokenizer, config.parse(tree | {"eval": {"rows": 2, "problems": 5}}))
    assert len(measured) == 2 and warnings[0].startswith("of 5 held-out rows 5")


@pytest.mark.parametrize("command", ["data", "plan"])
def test_data_and_plan_refuse_the_held_out_rows_that_train_would(
    unsloth: None, tmp_path: Path, cache: Path, command: str
) -> None:
    held = write(tmp_path / "held.jsonl", [GOOD, {**GOOD, "label": False}])
    asked, quiet = settings("builtin:arithmetic", eval=held), terminal.Reporter(quiet=True)
    with pytest.raises(DataError, match="held.jsonl line 2 is preference data"):
        plan.look(asked, None, quiet) if command == "plan" else inspect_data.look(asked, 0, quiet)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub of one data set. `streamed`: how it was asked for."""
    import datasets

    it = SimpleNamespace(commit="1", rows=arithmetic.generate("train", rows=30), rows_said=5000, streamed=[])

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> Any:
        it.streamed.append(streaming)
        made = datasets.Dataset.from_list(it.rows)
        return made.to_iterable_dataset() if streaming else made

    def builder(name: str, subset: str | None) -> Any:
        splits = {"train": SimpleNamespace(num_examples=it.rows_said)}
        return SimpleNamespace(hash=it.commit, info=SimpleNamespace(splits=splits))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return it


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_set_is_streamed_where_that_is_asked_for(
    cache: Path, tiny_tokenizer: Any, hub: Any, streaming: bool
) -> None:
    asked = settings("owner/name", streaming=streaming, eval_share=0.5)
    made = encode(tiny_tokenizer, "owner/name", streaming=streaming, eval_share=0.5)
    assert load.with_format(asked).data.format == "question_answer"
    from fasttune.core import evaluation

    asked.samples = 2
    assert len(evaluation.problems_of(asked, tiny_tokenizer, made, print)) == 2
    assert set(hub.streamed) == {streaming} and len(hub.streamed) == 4


@pytest.mark.parametrize(("rows_said", "max_rows"), [(5000, None), (5000, 20), (30, None)])
def test_a_plan_downloads_no_hub_set(
    unsloth: None, cache: Path, hub: Any, rows_said: int, max_rows: int | None
) -> None:
    hub.rows_said = rows_said
    figures = plan.look(settings("owner/name", max_rows=max_rows), "h100-80", terminal.Reporter(quiet=True))
    assert hub.streamed and all(hub.streamed)
    assert figures.sampled == (rows_said > plan.SAMPLED_ROWS and max_rows is None)


@pytest.mark.parametrize("streaming", [True, False])
def test_another_revision_makes_another_entry(cache: Path, tiny_tokenizer: Any, hub: Any, streaming: bool) -> None:
    assert len(encode(tiny_tokenizer, "owner/name", streaming=streaming).parts[0]) == 30
    hub.commit, hub.rows = "2", hub.rows[:20]
    assert len(encode(tiny_tokenizer, "owner/name", streaming=streaming).parts[0]) == 20
    assert len(entries(cache)) == 2
