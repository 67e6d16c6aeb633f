"""Rows → conversations. The form of a row is recognised by its keys:

messages                 a list of {"role", "content"}; the last turn is the assistant's
question, answer         GSM8K
query, response          MetaMathQA
prompt, completion       strings
instruction, output      Alpaca, with an optional input
text                     continued pretraining: every token is trained
"""

from typing import Any

from fasttune.data.sources import Row
from fasttune.errors import DataError

Message = dict[str, str]

PAIRS = [("question", "answer"), ("query", "response"), ("prompt", "completion"), ("instruction", "output")]
ROLES = ("system", "user", "assistant", "tool")


def rename(row: Row, columns: dict[str, str]) -> Row:
    """Apply `data.columns` (canonical name → name in the file); raises DataError for a column the row lacks."""
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise DataError(f"data.columns: the rows have no {', '.join(missing)}; they have {', '.join(row)}")
    return {**row, **{canonical: row[name] for canonical, name in columns.items()}}


def conversation(row: Row, number: int) -> list[Message] | str:
    """Messages of a row, or its plain text. `number` (from 1) names the row in a DataError."""
    if row.get("messages") is not None:
        return _messages(row["messages"], number)
    for prompt, answer in PAIRS:
        if row.get(prompt) is not None and row.get(answer) is not None:
            question = _string(row, prompt, number)
            if prompt == "instruction" and row.get("input"):
                question += "\n\n" + _string(row, "input", number)
            return [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _string(row, answer, number)},
            ]
    if row.get("text") is not None:
        return _string(row, "text", number)
    known = "messages | text | " + " | ".join("+".join(pair) for pair in PAIRS)
    raise DataError(
        f"data: row {number} has the columns {', '.join(row) or 'none'}; expected one of {known}; "
        "map yours with data.columns, e.g. data.columns={question: problem, answer: solution}"
    )


def _string(row: Row, key: str, number: int) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"data: row {number}: {key} is {type(row[key]).__name__}, expected text")
    return row[key]


def _messages(value: Any, number: int) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: row {number}: messages is no list of turns")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(f"data: row {number}: a turn needs a role ({', '.join(ROLES)}) and a text content")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"data: row {number}: no assistant turn, nothing to train on")
    return turns
