"""Every form of a row trains end to end from a file of that form, and bad files are one line that names the place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fasttune import config, terminal
from fasttune.errors import DataError

QUESTION, ANSWER = "How much is 3 + 4?", "3 + 4 = 7\n#### 7"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
    "conversations": {"conversations": SHAREGPT * 2},
    "question_answer": {"question": QUESTION, "answer": ANSWER},
    "query_response": {"query": QUESTION, "response": ANSWER, "type": "MATH"},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt_completion of messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "alpaca": {"instruction": "Add.", "input": "3 + 4", "output": ANSWER, "history": [["Hi", "Hello"]]},
    "text": {"text": QUESTION + "\n" + ANSWER},
}


def tree(file: Path, **data: Any) -> dict[str, Any]:
    return {
        "model": {"name": "builtin:tiny", "max_length": 256},
        "data": {"train": str(file), **data},
        "train": {"batch_rows": 4, "max_steps": 1},
        "output_dir": str(file.parent / "run"),
    }


def train(file: Path, changes: dict[str, Any] | None = None, **data: Any) -> Any:
    from fasttune.core import train as training

    return training.run(config.parse(tree(file, **data) | (changes or {})), terminal.Reporter(quiet=True))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the kind of file that the name of the path says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


NESTED = [(form, ending) for form in ("messages", "alpaca") for ending in ("jsonl.gz", "parquet")]


def learned_of(form: str) -> int:
    """Byte tokens of the answers and the end of each turn."""
    if form == "text":
        return len(QUESTION + "\n" + ANSWER)  # EOS too, but the first token is predicted from nothing
    answer = len(ANSWER) + 1
    return {"conversations": 2 * answer, "alpaca": len("Hello") + 1 + answer}.get(form, answer)


def test_files_of_every_form_train(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Each by itself gives the tokens to learn, and one run learns those of all."""
    from fasttune.data import load
    from fasttune.data.tokenize import IGNORE

    files = {}
    for number, (form, ending) in enumerate([*((form, "jsonl") for form in ROWS), *NESTED]):
        file = write(tmp_path / f"{number}.{ending}", [ROWS[form]] * 4)
        files[str(file)] = 4 * learned_of(form)
        made = load.encode(config.parse(tree(file)), tiny_tokenizer, True, lambda what, share: None)
        learned = sum(int((batch["labels"] != IGNORE).sum()) for batch in made.micro_batches(0))
        assert (made.steps_per_epoch, learned) == (1, files[str(file)]), (form, ending)
    result = train(file, {"train": {"batch_rows": 4 * len(files), "max_steps": 1}}, train=dict.fromkeys(files, 1))
    assert (result.status, result.steps, result.held_out) == ("completed", 1, None)
    assert result.backend.packing.startswith(f"packed: {4 * len(files)} rows")
    assert result.loss_tokens == sum(files.values())


GOOD = json.dumps(ROWS["question_answer"])


def test_a_bad_file_is_named_and_nothing_is_written(unsloth: None, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD + '\n{"question": "x", "answ')
    with pytest.raises(DataError, match=r"rows.jsonl line 2 is no valid JSON.*cut off") as caught:
        train(file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_quickstart_takes_rows_of_any_form(unsloth: None, tmp_path: Path) -> None:
    """Its held-out rows are built in, and of another form."""
    file = write(tmp_path / "mine.jsonl", [ROWS["messages"]] * 4)
    changes = ["model.name=builtin:tiny", f"output_dir={tmp_path}/run", "train.max_steps=1", "eval.problems=2"]
    settings = config.load("configs/quickstart.yaml", [f"data.train={file}", *changes])
    from fasttune.core import train as training

    result = training.run(settings, terminal.Reporter(quiet=True))
    assert (result.status, result.held_out.rows, result.exact_match.problems) == ("completed", 32, 2)
    assert config.load(tmp_path / "run" / "config.yaml").data.format == "auto"  # fed back, it is read the same way


def test_held_out_rows_that_are_trained_on_are_warned_of(unsloth: None, tmp_path: Path) -> None:
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    held = write(tmp_path / "held.jsonl", [*rows[:2], {"question": "9?", "answer": "9"}])
    result = train(write(tmp_path / "rows.jsonl", rows), eval=str(held))
    assert [warning for warning in result.warnings if warning.startswith("of 3 held-out rows 2 have a prompt")]
    assert "not trained on" not in (tmp_path / "run" / "report.html").read_text()
