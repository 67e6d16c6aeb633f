"""Where rows come from: a JSONL, Parquet or CSV file, a hub data set (owner/name or owner/name:subset), or
builtin:arithmetic → list of dicts.
"""

from pathlib import Path
from typing import Any

from fasttune.data import arithmetic
from fasttune.errors import DataError

Row = dict[str, Any]

READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def check(source: str, split: str = "train") -> None:
    """Fail early, before anything heavy is imported: DataError if a file is missing or of an unknown kind."""
    if source.startswith("builtin:"):
        if source != "builtin:arithmetic":
            raise DataError(f"data: {source} is unknown; the built-in data set is builtin:arithmetic")
        return
    path = Path(source).expanduser()
    if path.is_file():
        if split != "train":
            raise DataError(f"data.split={split} would be ignored: {source} is a file, it has no splits; remove it")
        if path.suffix.lower() not in READERS:
            raise DataError(f"data: {source} has an unknown ending; use {', '.join(READERS)}")
        if path.stat().st_size == 0:
            raise DataError(f"data: {source} is empty")
    elif path.is_dir():
        raise DataError(f"data: {source} is a folder; name one file of it")
    elif path.suffix.lower() in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise DataError(
            f"data: no file {source} (looked in {Path.cwd()}); check the path, or give a hub id, owner/name"
        )


def read(source: str, part: arithmetic.Part, split: str = "train", max_rows: int | None = None) -> list[Row]:
    """All rows of a source, in its order. `part` is of a built-in set (train or held-out), `split` of a hub set."""
    check(source, split)
    if source == "builtin:arithmetic":
        return list(arithmetic.generate(part, rows=max_rows or (2000 if part == "train" else 40)))
    rows = _load(source, split)
    rows = rows.select(range(min(max_rows, len(rows)))) if max_rows else rows
    if not len(rows):
        raise DataError(f"data: {source} holds no rows")
    return rows.to_list()


def _load(source: str, split: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    try:
        if path.is_file():
            kind = READERS[path.suffix.lower()]
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        name, _, subset = source.partition(":")
        return datasets.load_dataset(name, subset or None, split=split)
    except DatasetGenerationError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"data: {source} cannot be parsed ({cause}); {_first_bad_line(path)}") from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data: {source} cannot be loaded ({reason}); check the id and split, `hf auth login` for a gated set, "
            "or download it and give the file"
        ) from error


def _first_bad_line(path: Path) -> str:
    """Names the first line of a JSONL file that is no JSON object."""
    import json

    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return "check that every row has the same columns"
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object"
            except json.JSONDecodeError as error:
                return f"line {number} is no valid JSON: {error.msg}"
    return "every line is JSON, but the columns change their type between rows"
