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
from functools import lru_cache
from typing import Any

from fasttune.data import calls
from fasttune.data.calls import Message
from fasttune.errors import DataError, short

Row = dict[str, Any]

COLUMNS = {  # by the names of config.FORMATS
    "messages": ("messages",),
    "conversations": ("conversations",),
    "question_answer": ("question", "answer"),
    "query_response": ("query", "response"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
BESIDE = ("system", "history", "tools", "functions")  # beside every form but text
QUESTIONS = {"prompt": "completion", "question": "answer", "query": "response", "instruction": "output"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant")}
SHAREGPT_ROLES["observation"] = "tool"
FLAGS = ("weight", "loss_weight", "train", "loss", "masked")  # of a turn, or of a whole row; `masked` is torchtune's
LIKE_FLAGS = ("train", "loss", "weight", "mask", "learn")  # what a part of the name of another flag begins with
FLAG_VALUES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
LABELS = ("label", "kto_tag")  # false: the answer is a bad one
PREFERENCE = re.compile(r"(chosen|rejected).*")
MEDIA = re.compile(r"(image|picture|audio|sound|video)s?(_(path|url|file)s?)?")
USED = {form: {*own, *LABELS, *(BESIDE if form != "text" else ())} for form, own in COLUMNS.items()}
USED["alpaca"].add("input")
MEDIA_MARKS = ("<image>", "<audio>", "<video>")  # in a text alone they may as well be markup
NAME_CHARACTERS = 60


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
    return f"set data.columns={{{answer}: chosen}}"


def not_used(row: Row, form: str) -> set[str]:
    """Names, cut to a readable length, of what says something in a row and is not used."""
    used = USED[form]
    found = {f"column {key}" for key, value in row.items() if key not in used and value not in (None, "", [])}
    turns: Any = row.get(COLUMNS[form][0])
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        role = turn.get("role", turn.get("from"))
        if "from" in turn:
            found |= {f"{key} of a turn" for key in turn if key not in ("from", "value", *FLAGS) and turn[key]}
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
            "one format a file; set data.format or data.columns if the first row misled"
        )
    if any(FLAG_VALUES.get(str(row[key]).strip().lower()) is False for key in FLAGS[:-1] if key in row):
        raise Unusable("marked as not to be trained on")
    if form == "text":
        return _filled(row, "text", place)
    only_read = 0  # first turns
    if form in ("messages", "conversations"):
        turns = _turns(row[form], place, _openai if form == "messages" else _sharegpt)
    elif form == "prompt_completion" and isinstance(row["prompt"], list):
        turns = _turns(row["prompt"], place, _openai)
        only_read = len(turns)
        turns += _turns(row["completion"], place, _openai)
    else:
        question, answer = COLUMNS[form]
        asked = _filled(row, question, place)
        if form == "alpaca" and (extra := _filled(row, "input", place, optional=True)):
            asked += "\n\n" + extra
        turns = [_turn("user", asked), _turn("assistant", _filled(row, answer, place))]
    before = _system_and_history(row, turns, place)
    only_read = only_read and only_read + len(before)
    if turns[0]["role"] in ("system", "developer"):
        before = [turns.pop(0), *before]
    return _conversation([*before, *turns], calls.tools_of(row, place), only_read)


def _system_and_history(row: Row, turns: list[Message], place: str) -> list[Message]:
    """The turns of the columns `system`, which a system turn overrules, and `history`."""
    system = "" if turns[0]["role"] in ("system", "developer") else _filled(row, "system", place, optional=True)
    history = calls.from_json(row.get("history"), "history", place) or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise DataError(f"data: {place}: history is {short(history)}, expected [question, answer] pairs")
    earlier = [turn for asked, said in history for turn in (_turn("user", asked), _turn("assistant", said))]
    return [_turn("system", system), *earlier] if system else earlier


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


def _turns(value: Any, place: str, convert_turn: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {place}: expected a list of turns, found {short(value)}")
    return [convert_turn(turn, place) | _weight(turn, place) for turn in value]


def _openai(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise DataError(f"data: {place}: a turn needs a role ({', '.join(ROLES)}), found {short(turn)}")
    # Parquet fills absent keys with null
    left_out = ("tool_calls", "function_call", *FLAGS)
    kept = {key: part for key, part in turn.items() if part is not None and key not in left_out}
    if kept["role"] == "function":
        kept["role"] = "tool"
    called = calls.from_json(turn.get("tool_calls"), "tool_calls", place) or turn.get("function_call")
    if called:
        kept["tool_calls"] = [calls.in_form(call, place) for call in (called if isinstance(called, list) else [called])]
    wordless = called and turn.get("content") is None  # some templates ask whether it is null
    return {**kept, "content": None if wordless else _text_of(turn.get("content"), place)}


def _sharegpt(turn: Any, place: str) -> Message:
    speaker = str(turn.get("from")) if isinstance(turn, dict) else ""
    role = SHAREGPT_ROLES.get(speaker, speaker)
    if role not in ROLES or not isinstance(turn.get("value"), str):
        raise DataError(
            f"data: {place}: a turn needs `from` ({', '.join(SHAREGPT_ROLES)}) and a text `value`, found {short(turn)}"
        )
    if speaker == "function_call":
        if (turn := calls.of_text(turn["value"])) is None:
            raise Unusable("a function_call turn that is no JSON of name and arguments")
        return turn
    return _turn("tool" if role == "function" else role, turn["value"])


def _weight(marked: Row, place: str) -> dict[str, int]:
    """{"weight": 0} for a turn or a part of one that its flags say not to train on, else {}.

    Raises DataError for a flag that is not known or says something else.
    """
    trained = True
    for key, value in marked.items():
        if value is None:
            continue
        if key in FLAGS:
            said = FLAG_VALUES.get(str(value).strip().lower())
            if said is None:
                raise DataError(f"data: {place}: {key} is {short(value)}; it can be 1 or true, 0 or false")
            trained = trained and said is not (key == "masked")
        elif value and _is_like_a_flag(key):
            raise DataError(
                f"data: {place}: a turn has {key[:60]}, which is not known; whole turns are left out with weight: 0"
            )
    return {} if trained else {"weight": 0}


@lru_cache
def _is_like_a_flag(key: str) -> bool:
    return any(part.startswith(LIKE_FLAGS) for part in key.lower().split("_"))


def _text_of(content: Any, place: str) -> str:
    """OpenAI's content: a text, nothing (beside a tool call), or a list of text parts."""
    if isinstance(content, list):
        return "".join(_text_of_part(part, place) for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"data: {place}: content is {short(content)}, expected text")
    return content or ""


def _text_of_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text"):
        why = "expected {type: text, text: …}"
        if re.search("image|picture|audio|sound|video", str(kind)):
            why = "pictures, sound and video cannot be used"
        elif kind in ("reasoning", "thinking"):
            why = "write its text as reasoning_content of the turn"
        raise DataError(f"data: {place}: a part of a turn is {short(part)}; {why}")
    if _weight(part, place):
        raise DataError(f"data: {place}: a part of a turn has weight 0; only whole turns can be left out")
    text = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), "")
    if not isinstance(text, str) or (len(part) > 1 and not {"text", "value", "content"} & set(part)):
        raise DataError(f"data: {place}: a part of a turn is {short(part)}, which holds no text")
    return text


def _turn(role: str, content: str) -> Message:
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
