"""Tools and tool calls in the ways that rows have them → as chat templates take them: OpenAI's `tool_calls` of
`{"type": "function", "function": {"name", "arguments"}}`, arguments an object.
"""

import json
from collections.abc import Iterator
from typing import Any

from fasttune.errors import DataError, short

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")  # what templates call it


class Arguments(dict[str, Any]):
    """A call's arguments that its row has as JSON text: the object, and that text for templates that want it."""

    _said = "{}"  # a template cannot reach a name that begins so: `arguments.text` is the argument


def of_turn(turn: Message, place: str) -> Message:
    """A turn with its calls in today's form: `function_call` is one of them, and an empty list is none."""
    calls = from_json(turn.get("tool_calls"), "tool_calls", place) or turn.get("function_call")
    rest = {key: part for key, part in turn.items() if key not in ("tool_calls", "function_call")}
    if turn.get("role") == "function":
        rest["role"] = "tool"
    if not calls:
        return rest
    return {**rest, "tool_calls": [_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]}


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
    said = {"role": "assistant", "content": thought + closed or None}
    return {**said, "tool_calls": [_call(call, "a function_call turn") for call in calls]}


def tools_of(row: dict[str, Any], place: str) -> list[Any] | None:
    """The tools a conversation may call: JSON schemas, or one text of JSON that holds them; `functions` are tools."""
    name = "tools" if row.get("tools") else "functions"
    tools = from_json(row.get(name), name, place) or None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"data: {place}: {name} is {short(tools)}, expected a list of JSON schemas")
    return [{"type": "function", **_wrapped(tool)} if _is_bare(tool) else tool for tool in tools]


def from_json(value: Any, what: str, place: str) -> Any:
    """A value that may be written as JSON text. Raises DataError."""
    if not isinstance(value, str) or not value.strip():
        return value or None if isinstance(value, str | list) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        deep = "nested too deeply" if isinstance(error, RecursionError) else "no JSON"
        raise DataError(f"data: {place}: {what} is {short(value)}, {deep}: expected a list of JSON objects") from None


def ways(messages: list[Message]) -> Iterator[list[Message]]:
    """The same turns as templates may want them, the likeliest first: arguments as an object, then as text; beside a
    call no content as null, then as ""; reasoning under the name of the row, then under the others.
    """
    named = [key for key in REASONING if any(turn.get(key) for turn in messages)]
    names = [None, *(key for key in REASONING if [key] != named)] if named else [None]
    has_calls = any("tool_calls" in turn for turn in messages)
    empty = has_calls and any("tool_calls" in turn and not turn["content"] for turn in messages)
    for name in names:
        renamed = messages if name is None else [_renamed(turn, name) for turn in messages]
        for as_text in (False, True) if has_calls else (False,):
            written = [_with_text(turn) for turn in renamed] if as_text else renamed
            yield written
            if empty:
                yield [_other_nothing(turn) for turn in written]


def spoiled(messages: list[Message], text: str) -> bool:
    """Whether a template has written Python instead of JSON: an object as {'a': None}, or None for no content."""
    for turn in messages:
        for call in turn.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if arguments and isinstance(arguments, dict) and str(arguments) in text:
                return json.dumps(arguments, ensure_ascii=False) != str(arguments)
    return any(turn["content"] is None for turn in messages) and "None" in text


def _call(call: Any, place: str) -> dict[str, Any]:
    call = _wrapped(call) if _is_bare(call) else call
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"data: {place}: a tool call is {short(call)}, expected {{function: {{name, arguments}}}}")
    kind = call.get("type") or "function"
    return {**call, "type": kind, "function": {**function, "arguments": _arguments(function, place)}}


def _arguments(function: dict[str, Any], place: str) -> Any:
    said = function.get("arguments")
    if said is None or said == "":
        return {}
    if not isinstance(said, str):
        return said
    try:
        read = json.loads(said)
    except RecursionError:
        raise DataError(
            f"data: {place}: the arguments of a call of {function['name'][:60]} are nested too deeply"
        ) from None
    except ValueError:
        return said  # no JSON: the template gets the text
    if not isinstance(read, dict):
        return said
    arguments = Arguments(read)
    arguments._said = said
    return arguments


def _is_bare(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and "function" not in value


def _wrapped(bare: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call that is given as its function alone."""
    outside = {key: bare[key] for key in ("id",) if key in bare}
    return outside | {"function": {key: part for key, part in bare.items() if key not in ("id", "type")}}


def _with_text(turn: Message) -> Message:
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        given = call["function"]["arguments"]
        text = (
            given if isinstance(given, str) else getattr(given, "_said", None) or json.dumps(given, ensure_ascii=False)
        )
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**turn, "tool_calls": calls}


def _other_nothing(turn: Message) -> Message:
    if "tool_calls" not in turn or turn["content"]:
        return turn
    return {**turn, "content": "" if turn["content"] is None else None}


def _renamed(turn: Message, name: str) -> Message:
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
    rest = {key: part for key, part in turn.items() if key not in REASONING}
    return rest if reasoning is None else {**rest, name: reasoning}
