"""What of a conversation is not in the text that a chat template made of it.

Compared after whitespace, quotes and JSON escapes: templates trim, indent and escape what they are given.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from fasttune.data.calls import REASONING, Arguments, Message

WORDS = {  # by the names of config.LOSSES
    "content": "what a turn says",
    "reasoning": "its reasoning",
    "tool_calls": "its tool calls",
    "tools": "the tools",
    "tool_turns": "what a tool answered",
}
KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING}  # of a turn; others are named where unread
THINK = re.compile(r"</?think(?:ing)?>")
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\[nrtbf]|[\\\s\"']")  # of several levels of escaping, each goes


class Shown:
    """A rendered text that is asked what it holds."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def squeezed(self) -> str:
        return squeeze(self.text)

    def holds(self, value: str) -> bool:
        return value in self.text or squeeze(value) in self.squeezed


def squeeze(text: str) -> str:
    """Without whitespace and quotes, JSON's escapes undone."""
    plain = ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud83d\ude00 is one character


def of_turn(turn: Message, shown: Shown) -> set[str]:
    """Which parts of a turn are not there: names of WORDS."""
    content = turn["content"]
    found = set()
    if content and content not in shown.text:
        thought, _, said = content.rpartition("</think>")
        if not all(map(shown.holds, THINK.split(thought))):
            found.add("reasoning")
        if not all(map(shown.holds, THINK.split(said))):
            found.add("tool_turns" if turn["role"] == "tool" else "content")
    if len(turn) == 2:  # nothing but role and content
        return found
    if not all(shown.holds(turn[key]) for key in REASONING if isinstance(turn.get(key), str)):
        found.add("reasoning")
    if not all(_holds_call(call["function"], shown) for call in turn.get("tool_calls", ())):
        found.add("tool_calls")
    return found


def of_tools(tools: list[Any], shown: Shown) -> set[str]:
    """Which parts of the tools are not there: "tools" if a name of one or of its parameters is missing."""
    found = set()
    for tool in tools:
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        named = [function.get("name"), *(properties if isinstance(properties, dict) else ())]
        if not all(shown.holds(name) for name in named if isinstance(name, str)):
            found.add("tools")
        if not shown.holds(str(function.get("description") or "")):
            found.add("descriptions of tools")
    return found


def unread(turn: Message, source: str) -> set[str]:
    """Keys of a turn that the template's source never names."""
    return {key for key in turn.keys() - KEYS if key not in source}


def _holds_call(function: dict[str, Any], shown: Shown) -> bool:
    arguments = function["arguments"]
    if not shown.holds(function["name"]):
        return False
    if isinstance(arguments, Arguments) and arguments._said in shown.text:
        return True
    return all(map(shown.holds, _leaves(arguments)))


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
