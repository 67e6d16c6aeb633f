"""Rows and scoring of our tasks for EleutherAI's harness; the tasks themselves are the YAML files beside this one.

Each function that gives rows is called by the harness with the task's `metadata`, to which `--data` is added.
"""

from pathlib import Path
from typing import Any

from fasttune.data import arithmetic, formats, sources
from fasttune.data.formats import Row
from fasttune.errors import DataError

FOLDER = Path(__file__).parent
NAMES = ("gsm8k_jsonl", "multiple_choice_jsonl", "builtin:arithmetic")


def of_rows(source: str, split: str = "train", columns: dict[str, str] | None = None) -> str:
    """The task that fits a data set, by the keys of its first row. Raises DataError."""
    if source.startswith("builtin:"):
        sources.check_source(source)
        return "builtin:arithmetic"
    also = (columns or {}).values()
    rows = sources.first_rows(source, "test", split, 1, also=also)
    place, row = next(((place, row) for _, place, row in rows), (source, {}))
    row = formats.rename(row, formats.applying(columns or {}, row), place)
    if "options" in row:
        return "multiple_choice_jsonl"
    if "question" in row and arithmetic.final_number(str(row.get("answer"))) is not None:
        return "gsm8k_jsonl"
    raise DataError(
        f"--data {source}: {place} has the columns {', '.join(row) or 'none'}; expected question, answer and options, "
        "or question and an answer that ends in `#### N`"
    )


def gsm8k(data: str, split: str = "train", columns: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """question and answer, which must hold `#### N`."""
    return _split([_numbered(row, place) for place, row in _rows(data, ("question", "answer"), split, columns)], data)


def multiple_choice(data: str, split: str = "train", columns: dict[str, str] | None = None, **_: Any) -> dict[str, Any]:
    """question, options, and `right`: the index of the right one."""
    rows = []
    for place, row in _rows(data, ("question", "answer", "options"), split, columns):
        options = row["options"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise DataError(f"--data: {place}: options is {options!r}, expected a list of two texts or more")
        options = [option.strip() for option in options]
        rows.append({"question": row["question"], "options": options, "right": _right(row["answer"], options, place)})
    return _split(rows, data)


def score(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match on the number after `####`."""
    return {"exact_match": float(arithmetic.is_right(results[0], doc["answer"]))}


def _right(answer: Any, options: list[str], place: str) -> int:
    """The index of the right option: said as its text, its letter (A is the first) or its index (0 is the first)."""
    text = answer.strip() if isinstance(answer, str) else None
    if text in options:
        return options.index(text)
    letter = ord(text.upper()) - ord("A") if text and len(text) == 1 else None
    index = answer if isinstance(answer, int) and not isinstance(answer, bool) else letter
    if index is None or not 0 <= index < len(options):
        raise DataError(f"--data: {place}: answer {answer!r} is no option, no letter, no index")
    return index


def _rows(
    source: str, names: tuple[str, ...], split: str = "train", columns: dict[str, str] | None = None
) -> list[tuple[str, Row]]:
    found = []
    for chunk in sources.read(source, "test", split, also=(columns or {}).values()):
        for _, place, row in chunk.numbered():
            row = formats.rename(row, formats.applying(columns or {}, row), place)
            formats.check_media(row, place)
            if missing := [name for name in names if name not in row]:
                raise DataError(f"--data: {place} has no {', '.join(missing)} (it has {', '.join(row) or 'nothing'})")
            if not isinstance(row["question"], str):
                raise DataError(f"--data: {place}: question is {row['question']!r}, expected text")
            found.append((place, row))
    return found


def _numbered(row: Row, place: str) -> Row:
    if arithmetic.final_number(str(row["answer"])) is None:
        raise DataError(f"--data: {place}: its answer holds no `#### N`, so no answer to it can be checked")
    return {"question": row["question"], "answer": row["answer"]}


def _split(rows: list[Row], source: str) -> dict[str, Any]:
    import datasets

    if not rows:
        raise DataError(f"--data: {source} holds no rows")
    try:
        return {"test": datasets.Dataset.from_list(rows)}
    except UnicodeEncodeError as error:
        raise DataError(f"--data: {source} holds half a character: {error.reason}; write its rows as UTF-8") from error
