"""Rows → conversations. The form of a file is recognised by the keys of its first row; `data.format` overrules:

messages            OpenAI: a list of {"role", "content"}, tools and tool calls included
conversations       ShareGPT: a list of {"from", "value"}
question_answer     GSM8K: question, answer
query_response      MetaMathQA: query, response
prompt_completion   prompt, completion; two texts, or two lists of messages
alpaca              instruction, output, with an optional input
text                continued pretraining: every token is trained

Beside all but text: system (a system turn), history ([question, answer] pairs before the turns), tools. A turn may say
that it is not to be trained on (FLAGS).

Nothing that a row has is ignored silently: it is followed, refused by its name, or named as not used.
"""

import re
from dataclasses import dataclass
from typing import Any

from fasttune.errors import DataError, short

Row = dict[str, Any]
Message = dict[str, Any]  # a turn, as chat templates take it

COLUMNS = {  # by the names of settings.FORMATS
    "messages": ("messages",),
    "conversations": ("conversations",),
    "question_answer": ("question", "answer"),
    "query_response": ("query", "response"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
LISTED = ("history", "tools", "functions")
BESIDE = ("system", *LISTED)  # beside every form but text
QUESTIONS = {"prompt": "completion", "question": "answer", "query": "response", "instruction": "output"}
FLAGS = ("weight", "loss_weight", "train", "loss", "masked")  # of a turn, or of a whole row; `masked` is torchtune's
FLAG_VALUES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
LABELS = ("label", "kto_tag")  # false: the answer is a bad one
PREFERENCE = re.compile(r"(chosen|rejected).*")
MEDIA = re.compile(r"(image|picture|audio|sound|video)s?(_(path|url|file)s?)?")
USED = {form: {*own, *LABELS, *(BESIDE if form != "text" else ())} for form, own in COLUMNS.items()}
USED["alpaca"].add("input")
MEDIA_MARKS = ("<image>", "<audio>", "<video>")  # in a text alone they may as well be markup
NAME_CHARACTERS = 60
REASONING = ("reasoning_content", "reasoning", "thinking")  # of a turn, as templates call it
OF_SHAREGPT = ("from", "value", "tool_calls", *REASONING, *FLAGS)  # what is read of such a turn


class Unusable(Exception):
    """A row of the right form that teaches nothing (an empty answer, say): dropped and counted under this reason."""


class Refused(Unusable):
    """The chat template takes no such row."""


@dataclass(frozen=True)
class Conversation:
    """Turns as a chat template takes them; `answers`: indexes of the assistant's turns to train on."""

    messages: list[Message]
    answers: list[int]
    tools: list[Any] | None = None
    left_out: bool = False  # whether a flag keeps an answer from being trained on


def is_read(name: str) -> bool:
    """Whether a column means something by its name, in any form; no other one is read where that can be chosen."""
    known = {*(column for columns in COLUMNS.values() for column in columns), *BESIDE, *FLAGS, *LABELS}
    return name in known | {"input", "options"} or bool(PREFERENCE.fullmatch(name) or MEDIA.fullmatch(name))


def detect(row: Row, place: str) -> str:
    """The format of a file, from its first row; DataError names what is there and what is known."""
    for name, columns in COLUMNS.items():
        if all(column in row for column in columns):
            return name
    known = " | ".join("+".join(columns) for columns in COLUMNS.values())
    raise DataError(
        f"data: {place} has the columns {_names(row)}; expected one of {known}; "
        "map yours with data.columns, e.g. 'data.columns={question: problem, answer: solution}'"
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
    if any(map(PREFERENCE.fullmatch, taken)):
        taken |= set(filter(PREFERENCE.fullmatch, row))
    left = {name: value for name, value in row.items() if name not in taken}
    return left | {canonical: row[name] for canonical, name in columns.items()}


def applying(columns: dict[str, str], row: Row) -> dict[str, str]:
    """`data.columns` for one of several sources; {} where its rows have none of the names: its own are meant."""
    return columns if any(name in row for name in columns.values()) else {}


def check_row(row: Row, place: str) -> None:
    """Raise DataError for rows that show which answer is the better one, and for those about pictures or sound."""
    compared = [name for name, value in row.items() if PREFERENCE.fullmatch(name) and value]
    if compared:
        raise DataError(
            f"data: {place} is preference data ({', '.join(compared)[:60]}), which would be trained on as if all of it "
            f"were good; to train on the good answers alone {_without_bad(row)}"
        )
    for name in LABELS:
        if name in row and str(row[name]).lower() == "false":
            raise DataError(
                f"data: {place} is preference data: {name} is false, so its answer is a bad one; keep the rows where "
                "it is true"
            )
    check_media(row, place)


def check_media(row: Row, place: str) -> None:
    """Raise DataError for a row about pictures, sound or video."""
    for name, value in row.items():
        if MEDIA.fullmatch(name) and value and value != [None]:
            raise DataError(
                f"data: {place} has {name}: pictures, sound and video cannot be used; remove such rows, or the column "
                "if the text says all"
            )


def check_text(text: str, place: str) -> None:
    """Raise DataError for half a character (a lone surrogate), which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"data: {place} holds half a character, {half} after {text[: error.start][-20:]!r}: a text was cut there; "
            "write the whole one, or leave it out"
        ) from None


def _without_bad(row: Row) -> str:
    """What to do so that the good answers are trained on: where they are the chosen ones, to name their column."""
    if "chosen" not in row:
        return "remove such columns"
    chosen = row["chosen"]
    answer = next((QUESTIONS[name] for name in QUESTIONS if name in row), "text")
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict):
        whole = "prompt" not in row or chosen[0].get("role") in ("system", "user")
        answer = "messages" if whole else answer
    return f"set 'data.columns={{{answer}: chosen}}'"


def not_used(row: Row, form: str) -> set[str]:
    """Names, cut to a readable length, of what says something in a row and is not used."""
    used = USED[form]
    found = {f"column {key}" for key, value in row.items() if key not in used and value not in (None, "", [])}
    turns: Any = row.get(COLUMNS[form][0])
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        role = turn.get("role", turn.get("from"))
        if "from" in turn:
            found |= {f"{key} of a turn" for key in turn if key not in OF_SHAREGPT and turn[key]}
        if role in ("user", "human"):
            found |= {f"{key}: true of a {role} turn" for key in ("train", "loss") if turn.get(key) is True}
        if number == 0 and role == "system" and row.get("system") not in (None, "", *turn.values()):
            found.add("column system beside a system turn")
    return {name[:NAME_CHARACTERS] for name in found} if found else found


def convert(row: Row, form: str, place: str) -> Conversation | str:
    """A row as a conversation, or as plain text. Raises DataError for a wrong form, Unusable for an empty row."""
    missing = [column for column in COLUMNS[form] if column not in row]
    if missing:
        raise DataError(
            f"data: {place} has no {' and no '.join(missing)} (it has {_names(row)}), but the format is {form}: "
            "all rows of a file have one format; set data.format or data.columns if the first row was misread"
        )
    if any(FLAG_VALUES.get(str(row[key]).strip().lower()) is False for key in FLAGS[:-1] if key in row):
        raise Unusable("marked as not to be trained on")
    if form == "text":
        return _filled(row, "text", place)
    turns, only_read = _flat_or_listed(row, form, place)
    told = turns[0]["role"] in ("system", "developer")  # a system turn overrules the column
    system = "" if told else _filled(row, "system", place, optional=True)
    before, tools = [turn("system", system)] if system else [], None
    if any(row.get(name) for name in LISTED):
        from fasttune.data import turns as listed

        before += listed.history_of(row, place)
        tools = listed.tools_of(row, place)
    only_read = only_read and only_read + len(before)
    if told:
        before = [turns.pop(0), *before]
    return _conversation([*before, *turns], tools, only_read)


def _flat_or_listed(row: Row, form: str, place: str) -> tuple[list[Message], int]:
    """(the turns of a row without those of other columns, how many of the first ones are only read)."""
    if form in ("messages", "conversations") or (form == "prompt_completion" and isinstance(row["prompt"], list)):
        from fasttune.data import turns

        return turns.of_row(row, form, place)
    question, answer = COLUMNS[form]
    asked = _filled(row, question, place)
    if form == "alpaca" and (extra := _filled(row, "input", place, optional=True)):
        asked += "\n\n" + extra
    return [turn("user", asked), turn("assistant", _filled(row, answer, place))], 0


def _conversation(messages: list[Message], tools: Any, only_read: int) -> Conversation:
    """`only_read`: how many first turns are only read. `weight: 0` marks an answer that is only read, too."""
    spoken = [m["role"] for m in messages if m["role"] not in ("system", "developer")]
    if "assistant" not in spoken:
        raise Unusable("no assistant turn")
    if spoken[0] == "assistant":
        raise Unusable("begins with the assistant")
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    answers = [i for i in said if i >= only_read and "weight" not in messages[i]]
    if any(not (messages[i]["content"] or "").strip() and not messages[i].get("tool_calls") for i in answers):
        raise Unusable("empty answer")
    left_out = any("weight" in messages[i] for i in said)
    plain = [{key: part for key, part in m.items() if key != "weight"} for m in messages]
    return Conversation(plain, answers, tools, left_out)


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _filled(row: Row, key: str, place: str, optional: bool = False) -> str:
    """A text of a row; an optional one may be missing, null or blank."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        if optional:
            return ""
        raise Unusable("empty answer" if key in QUESTIONS.values() else f"empty {key}")
    if not isinstance(value, str):
        raise DataError(f"data: {place}: {key} is {short(value)}, expected text")
    return value


def _names(row: Row) -> str:
    names = ", ".join(map(str, row)) or "none"
    return names if len(names) <= 80 else names[:80] + "…"
