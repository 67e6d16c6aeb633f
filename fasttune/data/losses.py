"""What a chat template leaves out of a row, and the way of writing its turns that loses the least. Loaded for rows with
more than a text a turn: tools, calls, reasoning.

What was left out is looked for without whitespace, quotes and JSON escapes: templates trim, indent and escape.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from itertools import product
from typing import Any

from fasttune.data.formats import REASONING, Message, Unusable
from fasttune.data.turns import Arguments
from fasttune.errors import DataError

LOSSES = {  # by the names of settings.LOSSES
    "content": "what a turn says",
    "reasoning": "its reasoning",
    "tool_calls": "its tool calls",
    "tools": "the tools",
    "tool_turns": "what a tool answered",
}
KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING}  # of a turn; others are named where unread
THINK = re.compile(r"</?think(?:ing)?>")
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\[nrtbf]|[\\\s\"']")  # of several levels of escaping, each goes


def fitting(messages: list[Message], render: Callable[[list[Message]], str]) -> tuple[list[Message], str]:
    """The turns in the first of the ways that loses nothing (else the first that renders), and their text.

    Raises Unusable where the template refuses all of them.
    """
    best: tuple[int, list[Message], str] | None = None
    refused: Unusable | None = None
    for way in ways(messages):
        try:
            whole = render(way)
        except Unusable as error:
            refused = error
            continue
        shown = Shown(whole)
        last = next((turn for turn in reversed(way) if any(key in turn for key in REASONING)), None)
        parts = [lost_of_turn(turn, shown) - ({"reasoning"} if turn is not last else set()) for turn in way]
        flaws = 2 * any(parts) + is_python(way, whole)
        if best is None or flaws < best[0]:
            best = flaws, way, whole
        if not flaws:
            break
    if best is None:
        assert refused is not None
        raise refused
    return best[1:]


def check(
    whole: str,
    turns: list[Message],
    tools: list[Any] | None,
    source: str,
    supervised: dict[int, tuple[int, int]],
    place: str,
    allowed: Collection[str],
) -> set[str]:
    """What is not in the text `whole` of what the turns have; of a supervised turn in its span. `source`: the template.

    Raises DataError for what may not be lost.
    """

    def refuse(kind: str, where: str) -> None:
        raise DataError(
            f"data: {place}: the chat template leaves out {LOSSES[kind]}{where}: use a model whose template "
            f"has a place for it, or train without: 'data.allow_lost=[{kind}]'"
        )

    all_of_it, names = Shown(whole), set[str]()
    for index, turn in enumerate(turns):
        span = supervised.get(index)
        part = whole[span[0] : span[1]] if span else whole
        if len(turn) == 2 and turn["content"] in part:
            continue  # most turns
        asked = any(later["role"] == "user" for later in turns[index:])
        for kind in sorted(lost_of_turn(turn, Shown(part) if span else all_of_it)):
            dropped_by_design = kind == "reasoning" and asked and len(part) == len(whole)
            if kind not in allowed and (kind == "tool_turns" or (span and not dropped_by_design)):
                refuse(kind, f" (turn {index + 1})")
            names.add(kind if span or kind == "tool_turns" else f"{kind} of a turn that is only read")
        names |= {f"{key}, a key of a turn" for key in turn.keys() - KEYS if key not in source}
    missing = lost_of_tools(tools or [], all_of_it)
    if "tools" in missing - set(allowed):
        refuse("tools", "")
    return names | missing


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
