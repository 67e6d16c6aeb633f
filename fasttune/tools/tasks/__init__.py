"""Rows and scoring of our tasks for EleutherAI's harness; the tasks themselves are the YAML files beside this one, and
benchmarks.py.

`gsm8k` and `multiple_choice` are called by the harness with the task's `metadata`, to which `--data` is added.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune.data import arithmetic, formats, sources
from fasttune.data.formats import Row
from fasttune.errors import DataError

FOLDER = Path(__file__).parent
NAMES = ("gsm8k_jsonl", "multiple_choice_jsonl", "builtin:arithmetic")

Columns = dict[str, str] | None


def of_rows(source: str, split: str = "train", columns: Columns = None) -> str:
    """The task that fits a data set, by the keys of its first row. Raises DataError."""
    if source.startswith("builtin:"):
        sources.check_source(source)
        return "builtin:arithmetic"
    place, row = next(read(source, split, columns), (source, {}))
    if "options" in row:
        return "multiple_choice_jsonl"
    if "question" in row and arithmetic.final_number(str(row.get("answer"))) is not None:
        return "gsm8k_jsonl"
    raise DataError(
        f"--data {source}: {place} has the columns {', '.join(row) or 'none'}; expected question, answer and options, "
        "or question and an answer that ends in `#### N`"
    )


def gsm8k(data: str, split: str = "train", columns: Columns = None, **_: Any) -> dict[str, Any]:
    """question and answer, which must hold `#### N`."""
    found = []
    for place, row in read(data, split, columns):
        _check(row, place, "question", "answer")
        if arithmetic.final_number(str(row["answer"])) is None:
            raise DataError(f"--data: {place}: its answer holds no `#### N`, so no answer to it can be checked")
        found.append({"id": id_of(row), "question": row["question"], "answer": row["answer"]})
    return test_split(found, data)


def multiple_choice(data: str, split: str = "train", columns: Columns = None, **_: Any) -> dict[str, Any]:
    """question, options, and `right`: the index of the right one."""
    found = []
    for place, row in read(data, split, columns):
        _check(row, place, "question", "answer", "options")
        options = row["options"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise DataError(f"--data: {place}: options is {options!r}, expected a list of two texts or more")
        options = [option.strip() for option in options]
        right = _right(row["answer"], options, place)
        found.append({"id": id_of(row), "question": row["question"], "options": options, "right": right})
    return test_split(found, data)


def score(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match on the number after `####`."""
    return {"exact_match": float(arithmetic.is_right(results[0], doc["answer"]))}


def read(source: str, split: str, columns: Columns) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row, its columns by our names."""
    sources.check_asks(source, "--data")
    for chunk in sources.read(source, "test", split, also=(columns or {}).values()):
        for _, place, row in chunk.numbered():
            row = formats.rename(row, formats.applying(columns or {}, row), place)
            formats.check_media(row, place)
            yield place, row


def id_of(row: Row) -> str:
    """The name that a file gives a problem; empty where it gives none."""
    return "" if row.get("id") is None else str(row["id"])


def _check(row: Row, place: str, *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise DataError(f"--data: {place} has no {', '.join(missing)} (it has {', '.join(row) or 'nothing'})")
    if not isinstance(row["question"], str):
        raise DataError(f"--data: {place}: question is {row['question']!r}, expected text")


def _right(answer: Any, options: list[str], place: str) -> int:
    """The index of the right option: said as its text, its letter (A is the first) or its index (0 is the first)."""
    text = answer.strip() if isinstance(answer, str) else None
    if text in options:
        return options.index(text)
    letter = ord(text.upper()) - ord("A") if text and len(text) == 1 else None
    index = answer if isinstance(answer, int) and not isinstance(answer, bool) else letter
    if index is None or not 0 <= index < len(options):
        raise DataError(f"--data: {place}: answer {answer!r} is no option, no letter, no index")
    return options.index(options[index])  # of equal options the first: the one that the harness takes for chosen


def test_split(rows: list[Row], source: str) -> dict[str, Any]:
    import datasets

    if not rows:
        raise DataError(f"--data: {source} holds no rows")
    try:
        return {"test": datasets.Dataset.from_list(rows)}
    except UnicodeEncodeError as error:
        raise DataError(f"--data: {source} holds half a character: {error.reason}; write its rows as UTF-8") from error
