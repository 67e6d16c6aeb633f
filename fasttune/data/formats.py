"""Rows → conversations. The form of a file is recognised by the keys of its first row; `data.format` overrules:

messages            OpenAI: a list of {"role", "content"}, tools and tool calls included
conversations       ShareGPT: a list of {"from", "value"}
question_answer     GSM8K: question, answer
query_response      MetaMathQA: query, response
prompt_completion   prompt, completion; two texts, or two lists of messages
alpaca              instruction, output, with an optional input
text                continued pretraining: every token is trained

Beside all but text: system (a system turn), history ([question, answer] pairs before the turns), tools. A turn may say
that it is not to be trained on (beside.FLAGS).
"""

import re
from dataclasses import dataclass, field
from typing import Any

from fasttune.data import beside, calls
from fasttune.errors import DataError, short

Row = dict[str, Any]
Message = dict[str, Any]

COLUMNS = {  # by the names of config.FORMATS
    "messages": ("messages",),
    "conversations": ("conversations",),
    "question_answer": ("question", "answer"),
    "query_response": ("query", "response"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def is_read(name: str) -> bool:
    """Whether a column means something by its name, in any form; no other one is read where that can be chosen."""
    return any(name in columns for columns in COLUMNS.values()) or beside.is_read(name)


class Unusable(Exception):
    """A row of the right form that teaches nothing (an empty answer, say): dropped and counted under this reason."""


class Refused(Unusable):
    """The chat template takes no such row."""


@dataclass(frozen=True)
class Conversation:
    """Turns as a chat template takes them; `answers` are the indexes of the assistant's turns that may be learned."""

    messages: list[Message]
    answers: list[int]
    tools: list[Any] | None = field(default=None)
    left_out: bool = False  # whether a flag keeps an answer from being trained on


def detect(row: Row, place: str) -> str:
    """The format of a file, from its first row; DataError names what is there and what is known."""
    for name, columns in COLUMNS.items():
        if all(column in row for column in columns):
            return name
    known = " | ".join("+".join(columns) for columns in COLUMNS.values())
    raise DataError(
        f"data: {place} has the columns {_names(row)}; expected one of {known}; "
        "map yours with data.columns, e.g. data.columns={question: problem, answer: solution}"
    )


def rename(row: Row, columns: dict[str, str], place: str) -> Row:
    """Apply `data.columns` (canonical name → name in the file); raises DataError for a column the row lacks.

    Who names the chosen answers wants no rejected ones.
    """
    if not columns:
        return row
    taken = set(columns.values())
    if missing := [name for name in columns.values() if name not in row]:
        raise DataError(f"data.columns: {place} has no {', '.join(missing)}; it has {_names(row)}")
    if any(map(beside.PREFERENCE.fullmatch, taken)):
        taken |= set(filter(beside.PREFERENCE.fullmatch, row))
    left = {name: value for name, value in row.items() if name not in taken}
    return left | {canonical: row[name] for canonical, name in columns.items()}


def applying(columns: dict[str, str], row: Row) -> dict[str, str]:
    """`data.columns` for one of several sources; {} where its rows have none of the names: its own are meant."""
    return columns if any(name in row for name in columns.values()) else {}


def convert(row: Row, form: str, place: str) -> Conversation | str:
    """A row as a conversation, or as plain text. Raises DataError for a wrong form, Unusable for an empty row."""
    missing = [column for column in COLUMNS[form] if column not in row]
    if missing:
        raise DataError(
            f"data: {place} has no {' and no '.join(missing)} (it has {_names(row)}), but the format is {form}: "
            "one format a file; set data.format or data.columns if the first row misled"
        )
    if beside.is_left_out(row):
        raise Unusable("marked as not to be trained on")
    if form == "text":
        return _filled(row, "text", place)
    only_read = 0  # first turns
    if form == "messages":
        turns = _messages(row["messages"], place)
    elif form == "conversations":
        turns = _sharegpt(row["conversations"], place)
    elif form == "prompt_completion" and isinstance(row["prompt"], list):
        turns = _messages(row["prompt"], place)
        only_read = len(turns)
        turns += _messages(row["completion"], place)
    else:
        question, answer = COLUMNS[form]
        asked = _filled(row, question, place)
        if form == "alpaca" and (extra := _optional(row, "input", place)):
            asked += "\n\n" + extra
        turns = [_turn("user", asked), _turn("assistant", _filled(row, answer, place))]
    whole = _with_beginning(row, turns, place)
    return _checked(whole, calls.tools_of(row, place), only_read and only_read + len(whole) - len(turns))


def _with_beginning(row: Row, turns: list[Message], place: str) -> list[Message]:
    """The turns with the columns `system`, unless they begin with a system turn, and `history` before them."""
    system, rest = turns[:1], turns[1:]
    if system[0]["role"] not in ("system", "developer"):
        text = _optional(row, "system", place)
        system, rest = [_turn("system", text)] if text else [], turns
    history = calls.from_json(row.get("history"), "history", place) or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise DataError(f"data: {place}: history is {short(history)}, expected [question, answer] pairs")
    earlier = [_turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*system, *earlier, *rest]


def _checked(messages: list[Message], tools: Any = None, context: int = 0) -> Conversation:
    """`context`: how many first turns are only read. `weight: 0` marks an answer that is only read, too."""
    spoken = [m["role"] for m in messages if m["role"] not in ("system", "developer")]
    if "assistant" not in spoken:
        raise Unusable("no assistant turn")
    if spoken[0] == "assistant":
        raise Unusable("begins with the assistant")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= context and m.get("weight") != 0]
    if any(not (messages[i].get("content") or "").strip() and not messages[i].get("tool_calls") for i in answers):
        raise Unusable("empty answer")
    left_out = any(m["role"] == "assistant" and "weight" in m for m in messages)
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    return Conversation(plain, answers, tools or None, left_out)


def _messages(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {place}: expected a list of turns, found {short(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"data: {place}: a turn needs a role ({', '.join(ROLES)}), found {short(turn)}")
        # Parquet fills absent keys with null
        kept = {key: part for key, part in turn.items() if part is not None and key not in beside.FLAGS}
        kept = calls.of_turn(kept, place) | beside.weight(turn, place)
        wordless = "tool_calls" in kept and turn.get("content") is None  # some templates ask whether it is null
        turns.append({**kept, "content": None if wordless else _text_of(turn.get("content"), place)})
    return turns


def _text_of(content: Any, place: str) -> str:
    """OpenAI's content: a text, nothing (beside a tool call), or a list of text parts."""
    if isinstance(content, list):
        return "".join(_text_of_part(part, place) for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"data: {place}: content is {short(content)}, expected text")
    return content or ""


def _text_of_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in ("text", "input_text", "output_text"):
        why = "expected {type: text, text: …}"
        if isinstance(kind, str) and re.search("image|picture|audio|sound|video", kind):
            why = "pictures, sound and video cannot be used"
        elif kind in ("reasoning", "thinking"):
            why = "write its text as reasoning_content of the turn"
        raise DataError(f"data: {place}: a part of a turn is {short(part)}; {why}")
    if beside.weight(part, place):
        raise DataError(f"data: {place}: a part of a turn has weight 0; only whole turns can be left out")
    text = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), "")
    if not isinstance(text, str) or (len(part) > 1 and not {"text", "value", "content"} & set(part)):
        raise DataError(f"data: {place}: a part of a turn is {short(part)}, which holds no text")
    return text


def _sharegpt(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {place}: expected a list of turns, found {short(value)}")
    turns = []
    for turn in value:
        speaker = str(turn.get("from")) if isinstance(turn, dict) else ""
        role = SHAREGPT_ROLES.get(speaker, speaker)
        if role not in ROLES or not isinstance(turn.get("value"), str):
            raise DataError(
                f"data: {place}: a turn needs `from` ({', '.join(SHAREGPT_ROLES)}) and a text `value`, "
                f"found {short(turn)}"
            )
        turns.append(
            _spoken(speaker, "tool" if role == "function" else role, turn["value"]) | beside.weight(turn, place)
        )
    return turns


def _spoken(speaker: str, role: str, value: str) -> Message:
    if speaker != "function_call":
        return _turn(role, value)
    if (turn := calls.of_text(value)) is None:
        raise Unusable("a function_call turn that is no JSON of name and arguments")
    return turn


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _filled(row: Row, key: str, place: str) -> str:
    value = row[key]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable("empty answer" if key in ("answer", "response", "completion", "output") else f"empty {key}")
    if not isinstance(value, str):
        raise DataError(f"data: {place}: {key} is {short(value)}, expected text")
    return value


def _optional(row: Row, key: str, place: str) -> str:
    """A text that may be missing, null or blank."""
    blank = row.get(key) is None or not str(row[key]).strip()
    return "" if blank else _filled(row, key, place)


def _names(row: Row) -> str:
    names = ", ".join(map(str, row)) or "none"
    return names if len(names) <= 80 else names[:80] + "…"
