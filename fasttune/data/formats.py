"""Rows → conversations. The form of a file is recognised by the keys of its first row; `data.format` overrules:

messages            OpenAI: a list of {"role", "content"}, tools, tool calls and `weight: 0` included
conversations       ShareGPT: a list of {"from", "value"}
question_answer     GSM8K: question, answer
query_response      MetaMathQA: query, response
prompt_completion   prompt, completion; two texts, or two lists of messages
alpaca              instruction, output, with an optional input, system and history of [question, answer] pairs
text                continued pretraining: every token is trained
"""

from dataclasses import dataclass, field
from typing import Any

from fasttune.data import calls
from fasttune.data.calls import short as _short
from fasttune.errors import DataError

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
    """Apply `data.columns` (canonical name → name in the file); raises DataError for a column the row lacks."""
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise DataError(f"data.columns: {place} has no {', '.join(missing)}; it has {_names(row)}")
    return {**row, **{canonical: row[name] for canonical, name in columns.items()}}


def convert(row: Row, form: str, place: str) -> Conversation | str:
    """A row as a conversation, or as plain text. Raises DataError for a wrong form, Unusable for an empty row."""
    missing = [column for column in COLUMNS[form] if column not in row]
    if missing:
        raise DataError(
            f"data: {place} has no {' and no '.join(missing)} (it has {_names(row)}), but the format is {form}: "
            "one format a file; set data.format or data.columns if the first row misled"
        )
    if form == "text":
        return _filled(row, "text", place)
    if form == "messages":
        return _checked(_messages(row["messages"], place), calls.tools_of(row, place))
    if form == "conversations":
        return _checked(_sharegpt(row["conversations"], place), calls.tools_of(row, place))
    if form == "alpaca":
        return _checked(_alpaca(row, place))
    if form == "prompt_completion" and isinstance(row["prompt"], list):
        prompt, completion = _messages(row["prompt"], place), _messages(row["completion"], place)
        return _checked(prompt + completion, calls.tools_of(row, place), context=len(prompt))
    question, answer = COLUMNS[form]
    return _checked([_turn("user", _filled(row, question, place)), _turn("assistant", _filled(row, answer, place))])


def _checked(messages: list[Message], tools: Any = None, context: int = 0) -> Conversation:
    """`context`: how many first turns are only read. OpenAI's `weight: 0` marks an answer that is not learned."""
    spoken = [m["role"] for m in messages if m["role"] not in ("system", "developer")]
    if "assistant" not in spoken:
        raise Unusable("no assistant turn")
    if spoken[0] == "assistant":
        raise Unusable("begins with the assistant")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= context and m.get("weight") != 0]
    if any(not (messages[i].get("content") or "").strip() and not messages[i].get("tool_calls") for i in answers):
        raise Unusable("empty answer")
    return Conversation([{k: v for k, v in m.items() if k != "weight"} for m in messages], answers, tools or None)


def _messages(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {place}: expected a list of turns, found {_short(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"data: {place}: a turn needs a role ({', '.join(ROLES)}), found {_short(turn)}")
        kept = {key: part for key, part in turn.items() if part is not None}  # Parquet fills absent keys with null
        kept = calls.of_turn(kept, place)
        wordless = "tool_calls" in kept and turn.get("content") is None  # some templates ask whether it is null
        turns.append({**kept, "content": None if wordless else _text_of(turn.get("content"), place)})
    return turns


def _text_of(content: Any, place: str) -> str:
    """OpenAI's content: a text, nothing (beside a tool call), or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    if not isinstance(content, str):
        raise DataError(f"data: {place}: content is {_short(content)}, expected text (images and sound cannot be used)")
    return content


def _sharegpt(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {place}: expected a list of turns, found {_short(value)}")
    turns = []
    for turn in value:
        speaker = str(turn.get("from")) if isinstance(turn, dict) else ""
        role = SHAREGPT_ROLES.get(speaker, speaker)
        if role not in ROLES or not isinstance(turn.get("value"), str):
            raise DataError(
                f"data: {place}: a turn needs `from` ({', '.join(SHAREGPT_ROLES)}) and a text `value`, "
                f"found {_short(turn)}"
            )
        turns.append(_spoken(speaker, "tool" if role == "function" else role, turn["value"]))
    return turns


def _spoken(speaker: str, role: str, value: str) -> Message:
    if speaker != "function_call":
        return _turn(role, value)
    if (turn := calls.of_text(value)) is None:
        raise Unusable("a function_call turn that is no JSON of name and arguments")
    return turn


def _alpaca(row: Row, place: str) -> list[Message]:
    turns = [_turn("system", system)] if (system := _optional(row, "system", place)) else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise DataError(f"data: {place}: history is {_short(history)}, expected a list of [question, answer] pairs")
    for question, answer in history:
        turns += [_turn("user", question), _turn("assistant", answer)]
    question = _filled(row, "instruction", place)
    if extra := _optional(row, "input", place):
        question += "\n\n" + extra
    return [*turns, _turn("user", question), _turn("assistant", _filled(row, "output", place))]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _filled(row: Row, key: str, place: str) -> str:
    value = row[key]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable("empty answer" if key in ("answer", "response", "completion", "output") else f"empty {key}")
    if not isinstance(value, str):
        raise DataError(f"data: {place}: {key} is {_short(value)}, expected text")
    return value


def _optional(row: Row, key: str, place: str) -> str:
    """A text that may be missing, null or blank."""
    blank = row.get(key) is None or not str(row[key]).strip()
    return "" if blank else _filled(row, key, place)


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"
