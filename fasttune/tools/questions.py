"""Questions out of a file of rows, and the JSONL of their answers, which can be gone on with.

Beside OUT lies OUT.made-by.json: which weights, rows and settings its answers belong to.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fasttune import paths, report
from fasttune.data import formats, sources
from fasttune.data.formats import Conversation, Row, Unusable
from fasttune.errors import DataError, OutputError
from fasttune.tools.trained_model import Finished

NONE_YET = "?"  # stands for an answer that a row does not have; it is never shown to the model
SAMPLE_BYTES = 1 << 20


def read(
    source: str, columns: dict[str, str], system: str | None, split: str = "train"
) -> Iterator[tuple[int, Conversation | Unusable]]:
    """(row number from 1, its turns up to where the assistant would answer, or why there are none) of every row.

    Rows may have any form that can be trained on, answered or not. `columns` as data.columns, where a row has them;
    `system` for rows without a system turn; `split` of a hub set. Raises DataError.
    """
    for chunk in sources.read(source, "test", split, also=columns.values()):
        for number, place, row in chunk.numbered():
            row = formats.rename(row, columns, place) if all(name in row for name in columns.values()) else row
            formats.check_media(row, place)
            row = _answered(row)
            form = formats.detect(row, place)
            if form == "text":
                raise DataError(f'--file: {place} is plain text without a question; write {{"prompt": …}}')
            try:
                yield number, _question(formats.convert(row, form, place), system)
            except Unusable as error:
                yield number, error


def _question(row: Any, system: str | None) -> Conversation:
    messages = row.messages[: max(i for i, turn in enumerate(row.messages) if turn["role"] == "assistant")]
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages, [], row.tools)


def _answered(row: Row) -> Row:
    """The row, with something where its answer would stand: then it is a row as training has them."""
    for turns, speaker, text, assistant in (
        ("messages", "role", "content", "assistant"),
        ("conversations", "from", "value", "gpt"),
    ):
        said = row.get(turns)
        if isinstance(said, list) and said and isinstance(said[-1], dict):
            last = str(said[-1].get(speaker))
            over = formats.SHAREGPT_ROLES.get(last, last) != "assistant"
            return {**row, turns: [*said, {speaker: assistant, text: NONE_YET}]} if over else row
    for question, answer in formats.QUESTIONS.items():
        if question in row and not row.get(answer):
            turns_of = isinstance(row[question], list)
            return {**row, answer: [{"role": "assistant", "content": NONE_YET}] if turns_of else NONE_YET}
    return row


def identity(finished: Finished, source: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What answers belong to: the same on another machine with the same files."""
    return {
        "base": _weights(finished.base.name) + (f" {finished.base.revision}" if finished.base.revision else ""),
        "adapter": _weights(str(finished.adapter)) if finished.adapter else None,
        "rows": sources.fingerprint(source, "test", finished.reading(source)[0]),
        **settings,
    }


def _weights(name: str) -> str:
    folder = Path(name).expanduser()
    return hash_of_weights(folder) if folder.is_dir() else name


def hash_of_weights(folder: Path) -> str:
    """Of the size, the beginning and the end of every weight file: quick, and not fooled by a copy's dates."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            found.update(f"{path.name} {size}".encode() + file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            found.update(file.read())
    return found.hexdigest()


@contextmanager
def opened(out: Path, belongs_to: dict[str, Any]) -> Iterator[IO[str]]:
    """The answers file, to read and go on with; this process holds it. Raises OutputError, with nothing changed."""
    beside = out.with_name(out.name + ".made-by.json")
    if out.exists():
        _check_same(out, beside, belongs_to)
    elif not out.parent.is_dir():
        raise OutputError(f"--out: no folder {out.parent}; make it, or name another file")
    if not out.exists():
        report.write_json(beside, belongs_to)
    try:
        file = paths.open_text(out, "a+")
    except OSError as error:
        raise OutputError(f"--out: {out} cannot be written ({error.strerror}); name another file") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"--out: another process is writing {out}; wait for it, or name another file") from None
        yield file


def _check_same(out: Path, beside: Path, belongs_to: dict[str, Any]) -> None:
    other = "name another --out, or remove it"
    try:
        made_by = json.loads(paths.read_text(beside))
    except (OSError, ValueError):
        raise OutputError(f"--out: {out} exists and was not written by `fasttune generate`; {other}") from None
    for key, value in belongs_to.items():
        if made_by.get(key) != value:
            files = key in ("base", "adapter", "rows")
            what = f"other weights or rows ({key})" if files else f"{key}={made_by.get(key)}, now {value}"
            raise OutputError(f"--out: {out} holds answers of {what}; {other}")


def rows_in(file: IO[str], name: Path) -> set[int]:
    """Numbers of the rows that are answered. A last line torn by the end of a process is cut off.

    Raises OutputError for any other line that is no answer.
    """
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1]
    found = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.add(int(json.loads(line)["row"]))
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"--out: {name} line {number} is no answer; mend or remove it") from None
    file.truncate(len(whole.encode()))
    file.seek(0, os.SEEK_END)
    return found


def write(file: IO[str], lines: list[tuple[int, dict[str, Any]]]) -> None:
    """Lines {"row": …, "text": …, "tokens": …, "finish": …} to the end of the file, on the disk when this returns.

    Raises OutputError, with nothing of them in the file.
    """
    left = "".join(report.to_json_line({"row": row, **answer}) + "\n" for row, answer in lines).encode()
    number, before = file.fileno(), os.fstat(file.fileno()).st_size
    try:
        while left:  # not through the file's buffer, which would be written again when it is closed
            left = left[os.write(number, left) :]
        os.fsync(number)
    except OSError as error:
        os.ftruncate(number, before)
        raise OutputError(
            f"--out: {file.name} cannot be written ({error.strerror}); what it holds is whole: the same command goes on"
        ) from error
