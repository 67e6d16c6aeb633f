"""Turns, tools and history as rows have them → as chat templates take them. Loaded for rows that have such.

OpenAI's `messages`, ShareGPT's `conversations`. Templates take `tool_calls` of `{"type": "function", "function":
{"name", "arguments"}}`, arguments an object.
"""

import json
import re
from functools import lru_cache
from typing import Any

from fasttune.data.formats import FLAG_VALUES, FLAGS, REASONING, Message, Row, Unusable, turn
from fasttune.errors import DataError, short

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant")}
SHAREGPT_ROLES["observation"] = "tool"
ARGUMENTS = ("arguments", "parameters", "args", "input")  # of a call: Llama 3.1, LangChain and Anthropic have their own
LIKE_FLAGS = ("train", "loss", "weight", "mask", "learn")  # what a part of the name of another flag begins with


def of_row(row: Row, form: str, place: str) -> tuple[list[Message], int]:
    """(the turns of a row, how many of the first ones are only read). Raises DataError and Unusable."""
    if form != "prompt_completion":
        return _turns(row[form], place, _openai if form == "messages" else _sharegpt), 0
    asked = _turns(row["prompt"], place, _openai)
    return asked + _turns(row["completion"], place, _openai), len(asked)


def history_of(row: Row, place: str) -> list[Message]:
    """The turns of the column `history`."""
    history = from_json(row.get("history"), "history", place) or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise DataError(f"data: {place}: history is {short(history)}, expected [question, answer] pairs")
    return [each for asked, said in history for each in (turn("user", asked), turn("assistant", said))]


def _turns(value: Any, place: str, convert_turn: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {place}: expected a list of turns, found {short(value)}")
    return [convert_turn(each, place) | _weight(each, place) for each in value]


def _openai(given: Any, place: str) -> Message:
    if not isinstance(given, dict) or given.get("role") not in ROLES:
        raise DataError(f"data: {place}: a turn needs a role ({', '.join(ROLES)}), found {short(given)}")
    # Parquet fills absent keys with null
    left_out = ("tool_calls", "function_call", *FLAGS)
    kept = {key: part for key, part in given.items() if part is not None and key not in left_out}
    if kept["role"] == "function":
        kept["role"] = "tool"
    called = from_json(given.get("tool_calls"), "tool_calls", place) or given.get("function_call")
    if called:
        kept["tool_calls"] = [in_form(call, place) for call in (called if isinstance(called, list) else [called])]
    wordless = called and given.get("content") is None  # some templates ask whether it is null
    return {**kept, "content": None if wordless else _text_of(given.get("content"), place)}


def _sharegpt(given: Any, place: str) -> Message:
    speaker = str(given.get("from")) if isinstance(given, dict) else ""
    role = SHAREGPT_ROLES.get(speaker, speaker)
    if role not in ROLES or not isinstance(given.get("value"), str):
        raise DataError(
            f"data: {place}: a turn needs `from` ({', '.join(SHAREGPT_ROLES)}) and a text `value`, found {short(given)}"
        )
    if speaker == "function_call":
        if (called := of_text(given["value"])) is None:
            raise Unusable("a function_call turn that is no JSON of name and arguments")
        return called
    more = {key: given[key] for key in ("tool_calls", *REASONING) if given.get(key)}
    if more:
        return _openai({"role": role, "content": given["value"], **more}, place)
    return turn("tool" if role == "function" else role, given["value"])


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


class Arguments(dict[str, Any]):
    """A call's arguments that its row has as JSON text: the object, and that text for templates that want it."""

    _text = "{}"  # a template cannot reach a name that begins so: `arguments.text` is the argument


def tools_of(row: Row, place: str) -> list[Any] | None:
    """The tools a conversation may call: JSON schemas, or one text of JSON that holds them; `functions` are tools."""
    name = "tools" if row.get("tools") else "functions"
    tools = from_json(row.get(name), name, place) or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"data: {place}: {name} is {short(tools)}, expected a list of JSON schemas")
    return [{"type": "function", **_wrapped(tool)} if _is_bare(tool) else tool for tool in tools]


def in_form(call: Any, place: str) -> dict[str, Any]:
    """A call in today's form, its arguments an object where they are one or the JSON text of one; else as they are."""
    call = _wrapped(call) if _is_bare(call) else call
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"data: {place}: a tool call is {short(call)}, expected {{function: {{name, arguments}}}}")
    key = next((key for key in ARGUMENTS if function.get(key) is not None), "arguments")
    given = function.get(key)
    if given is None and (lost := [name for name, part in function.items() if isinstance(part, dict | list)]):
        raise DataError(f"data: {place}: a tool call has {lost[0][:60]} and no arguments; call them arguments")
    arguments: Any = {} if given is None or given == "" else given
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except RecursionError:
            what = f"the arguments of a call of {function['name'][:60]}"
            raise DataError(f"data: {place}: {what} are nested too deeply") from None
        except ValueError:
            read = None
        if isinstance(read, dict):
            arguments = Arguments(read)
            arguments._text = given
    named = {"arguments" if name == key else name: part for name, part in function.items()}
    function = named | {"arguments": arguments}
    try:
        json.dumps(arguments)
    except (TypeError, ValueError):  # of Parquet; sources.parse reads such a number as a Decimal
        what = f"the arguments of a call of {function['name'][:60]}"
        fix = "hold a date, bytes or a number of thousands of digits: write it as text"
        raise DataError(f"data: {place}: {what} {fix}") from None
    return {**call, "type": call.get("type") or "function", "function": function}


def _is_bare(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and "function" not in value


def _wrapped(bare: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call that is given as its function alone."""
    outside = {key: bare[key] for key in ("id",) if key in bare}
    return outside | {"function": {key: part for key, part in bare.items() if key not in ("id", "type")}}


def from_json(value: Any, what: str, place: str) -> Any:
    """A value that may be written as JSON text. Raises DataError."""
    if not isinstance(value, str) or not value.strip():
        return value or None if isinstance(value, str | list) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        deep = "nested too deeply" if isinstance(error, RecursionError) else "no JSON"
        raise DataError(f"data: {place}: {what} is {short(value)}, {deep}: expected a list of JSON objects") from None


def of_text(value: str) -> Message | None:
    """ShareGPT's function_call turn: JSON of a call or several, perhaps after `<think>…</think>`; else None."""
    thought, closed, rest = value.rpartition("</think>")
    try:
        calls = json.loads(rest)
    except (ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    calls = [in_form(call, "a function_call turn") for call in calls]
    return {"role": "assistant", "content": thought + closed or None, "tool_calls": calls}
