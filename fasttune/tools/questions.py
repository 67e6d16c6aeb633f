"""Questions out of a file of rows, and the JSONL of their answers, which is resumed where it ended.

Beside OUT lies OUT.made-by.json: which weights, rows and settings its answers belong to.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fasttune import report, system
from fasttune.data import formats, sources, turns
from fasttune.data.formats import Conversation, Row, Unusable
from fasttune.errors import DataError, OutputError, in_one_line
from fasttune.tools.trained_model import TrainedModel

NONE_YET = "?"  # stands for an answer that a row does not have; it is never shown to the model
TURNS = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}
SAMPLE_BYTES = 1 << 20


def read(
    source: str, columns: dict[str, str], system: str | None, split: str, skipped: dict[int, str]
) -> Iterator[tuple[int, Conversation]]:
    """(row number from 1, its turns up to where the assistant would answer); `skipped` gets why a row has none.

    Rows may have any form that can be trained on, answered or not. `columns` as data.columns, where a row has them;
    `system` for rows without a system turn; `split` of a hub set. Raises DataError.
    """
    sources.check_asks(source, "--file")
    for chunk in sources.read(source, "test", split, also=columns.values()):
        for number, place, row in chunk.numbered():
            row = formats.rename(row, columns, place) if all(name in row for name in columns.values()) else row
            formats.check_media(row, place)
            row = _answered(row)
            form = formats.detect(row, place)
            if form == "text":
                raise DataError(f'--file: {place} is plain text without a question; write {{"prompt": …}}')
            try:
                whole: Any = formats.convert(row, form, place)
            except Unusable as error:
                skipped[number] = str(error)
                continue
            last = max(at for at, turn in enumerate(whole.messages) if turn["role"] == "assistant")
            messages = whole.messages[:last]
            if system and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": system}, *messages]
            yield number, Conversation(messages, [], whole.tools)


def _answered(row: Row) -> Row:
    """The row, with something where its answer would stand: then it is a row as training has them."""
    for form, (speaker, text, assistant) in TURNS.items():
        said = row.get(form)
        if isinstance(said, list) and said and isinstance(said[-1], dict):
            last = str(said[-1].get(speaker))
            over = turns.SHAREGPT_ROLES.get(last, last) != "assistant"
            return {**row, form: [*said, {speaker: assistant, text: NONE_YET}]} if over else row
    for question, answer in formats.QUESTIONS.items():
        if question in row and not row.get(answer):
            turns_of = isinstance(row[question], list)
            return {**row, answer: [{"role": "assistant", "content": NONE_YET}] if turns_of else NONE_YET}
    return row


def identity(trained: TrainedModel, source: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What answers belong to: the same on another machine with the same files."""
    base = trained.base
    return {
        "base": _weights(base.name) + (f" {base.revision}" if base.revision else ""),
        "adapter": _weights(str(trained.adapter)) if trained.adapter else None,
        "rows": sources.fingerprint(source, "test", trained.reading(source)[0]),
        **settings,
    }


def _weights(name: str) -> str:
    """A name; of a folder the hash of the size, the beginning and the end of every weight file: quick, and not fooled
    by a copy's dates.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            found.update(f"{path.name} {size}".encode() + file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            found.update(file.read())
    return found.hexdigest()


@dataclass
class Answers:
    """An answers file, held by this process. `rows`: the numbers of those that are answered."""

    out: Path
    file: IO[str]
    rows: set[int]

    def add(self, lines: list[dict[str, Any]]) -> None:
        """To the end of the file, on the disk when this returns. Raises OutputError, with none of them in the file."""
        left = "".join(report.to_json_line(line) + "\n" for line in lines).encode()
        number, before = self.file.fileno(), os.fstat(self.file.fileno()).st_size
        whole = "what it holds is whole: the same command resumes it"
        with in_one_line(OutputError, f"--out: {self.out} cannot be written", whole, (OSError,)):
            try:
                while left:  # not through the file's buffer, which would be written again when it is closed
                    left = left[os.write(number, left) :]
                os.fsync(number)
            except OSError:
                os.ftruncate(number, before)
                raise


@contextmanager
def opened(out: Path, belongs_to: dict[str, Any]) -> Iterator[Answers]:
    """The answers file, to resume. Raises OutputError, with nothing changed, for one that belongs to something else."""
    made_by = out.with_name(out.name + ".made-by.json")
    if out.exists():
        _check_same(out, made_by, belongs_to)
    elif not out.parent.is_dir():
        raise OutputError(f"--out: no folder {out.parent}; make it, or name another file")
    else:
        report.write_json(made_by, belongs_to)
    with in_one_line(OutputError, f"--out: {out} cannot be written", "name another file", (OSError,)):
        file = system.open_text(out, "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"--out: another process is writing {out}; wait for it, or name another file") from None
        yield Answers(out, file, _rows_in(file, out))


def _rows_in(file: IO[str], out: Path) -> set[int]:
    """Numbers of the rows that are answered. A last line torn by the end of a process is cut off."""
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1]
    found = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.add(int(json.loads(line)["row"]))
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"--out: {out} line {number} is no answer; fix or remove it") from None
    file.truncate(len(whole.encode()))
    file.seek(0, os.SEEK_END)
    return found


def _check_same(out: Path, made_by: Path, belongs_to: dict[str, Any]) -> None:
    other = "name another --out, or remove it"
    try:
        then = dict(json.loads(system.read_text(made_by)))
    except (OSError, ValueError, TypeError):
        raise OutputError(f"--out: {out} exists and was not written by `fasttune generate`; {other}") from None
    for key, value in belongs_to.items():
        if then.get(key) != value:
            files = key in ("base", "adapter", "rows")
            what = f"other weights or rows ({key})" if files else f"{key}={then.get(key)}, now {value}"
            raise OutputError(f"--out: {out} holds answers of {what}; {other}")
