"""Tools, calls and reasoning: as rows have them → as chat templates take them, and what of them a template left out.

Templates take OpenAI's `tool_calls` of `{"type": "function", "function": {"name", "arguments"}}`, arguments an object.
What they left out is looked for without whitespace, quotes and JSON escapes: they trim, indent and escape.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from typing import Any

from fasttune.errors import DataError, short

Message = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")  # what templates call it
LOSSES = {  # by the names of config.LOSSES
    "content": "what a turn says",
    "reasoning": "its reasoning",
    "tool_calls": "its tool calls",
    "tools": "the tools",
    "tool_turns": "what a tool answered",
}
KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING}  # of a turn; others are named where unread
THINK = re.compile(r"</?think(?:ing)?>")
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\[nrtbf]|[\\\s\"']")  # of several levels of escaping, each goes


class Arguments(dict[str, Any]):
    """A call's arguments that its row has as JSON text: the object, and that text for templates that want it."""

    _text = "{}"  # a template cannot reach a name that begins so: `arguments.text` is the argument


def tools_of(row: dict[str, Any], place: str) -> list[Any] | None:
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
    given = function.get("arguments")
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
    return {**call, "type": call.get("type") or "function", "function": {**function, "arguments": arguments}}


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


def ways(messages: list[Message]) -> Iterator[list[Message]]:
    """The same turns as templates may want them, the likeliest first: reasoning under the name of the row, then under
    the others; arguments as an object, then as text; beside a call no content as null, then as "" (or the reverse).
    """
    named = [key for key in REASONING if any(turn.get(key) for turn in messages)]
    names = [None, *(key for key in REASONING if [key] != named)] if named else [None]
    calling = [turn for turn in messages if "tool_calls" in turn]
    no_content = not all(turn["content"] for turn in calling)
    for way in product(names, [False, True][: 1 + bool(calling)], [False, True][: 1 + no_content]):
        yield [_in_way(turn, *way) for turn in messages]


def _in_way(turn: Message, name: str | None, as_text: bool, other_nothing: bool) -> Message:
    if name:
        reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
        turn = {key: part for key, part in turn.items() if key not in REASONING}
        turn |= {} if reasoning is None else {name: reasoning}
    if "tool_calls" in turn and as_text:
        turn = {**turn, "tool_calls": [_with_text(call) for call in turn["tool_calls"]]}
    if "tool_calls" in turn and other_nothing and not turn["content"]:
        turn = {**turn, "content": "" if turn["content"] is None else None}
    return turn


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    given = call["function"]["arguments"]
    if not isinstance(given, str):
        given = given._text if isinstance(given, Arguments) else json.dumps(given, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": given}}


def is_python(messages: list[Message], text: str) -> bool:
    """Whether a template has written Python instead of JSON: an object as {'a': None}, or None for no content."""
    for turn in messages:
        for call in turn.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if arguments and isinstance(arguments, dict) and str(arguments) in text:
                return json.dumps(arguments, ensure_ascii=False) != str(arguments)
    return any(turn["content"] is None for turn in messages) and "None" in text


class Shown:
    """A rendered text that is asked what it holds."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def squeezed(self) -> str:
        return _squeeze(self.text)

    def holds(self, value: str) -> bool:
        return value in self.text or _squeeze(value) in self.squeezed

    def lacks(self, parts: list[tuple[str, str]]) -> set[str]:
        """The kinds of (kind, text) of which a text is not there."""
        found = set[str]()
        for kind, text in parts:
            if kind not in found and not self.holds(text):
                found.add(kind)
        return found


def _squeeze(text: str) -> str:
    """Without whitespace and quotes, JSON's escapes undone."""
    plain = ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud83d\ude00 is one character


def lost_of_turn(turn: Message, shown: Shown) -> set[str]:
    """Which parts of a turn are not in the text: names of LOSSES."""
    content = turn["content"]
    parts: list[tuple[str, str]] = []
    if content and content not in shown.text:
        thought, _, said = content.rpartition("</think>")
        parts += [("reasoning", text) for text in THINK.split(thought)]
        parts += [("tool_turns" if turn["role"] == "tool" else "content", text) for text in THINK.split(said)]
    parts += [("reasoning", turn[key]) for key in REASONING if isinstance(turn.get(key), str)]
    for function in (call["function"] for call in turn.get("tool_calls", ())):
        arguments = function["arguments"]
        as_given = isinstance(arguments, Arguments) and arguments._text in shown.text
        parts += [("tool_calls", text) for text in (function["name"], *(() if as_given else _leaves(arguments)))]
    return shown.lacks(parts)


def _leaves(value: Any) -> Iterator[str]:
    """Keys, texts and numbers, however deep. Templates write true, false and null in their own ways."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from map(str, item)
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif item is not None and not isinstance(item, bool):
            yield item if isinstance(item, str) else json.dumps(item)


def lost_of_tools(tools: list[Any], shown: Shown) -> set[str]:
    """Which parts of the tools are not there: "tools" if a name of one or of its parameters is missing."""
    parts: list[tuple[str, str]] = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        names = (function.get("name"), *(properties if isinstance(properties, dict) else ()))
        parts += [("tools", name) for name in names if isinstance(name, str)]
        parts.append(("descriptions of tools", str(function.get("description") or "")))
    return shown.lacks(parts)
