"""YAML as a config needs it: text, true, false, null, and lists and mappings of them, bounded.

Numbers stay text: the setting that wants one reads it. YAML 1.1 takes 1:30 for 90, 010 for 8, `on` for true, and of a
key that is given twice the last one, silently.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from fasttune import system

MAX_BYTES = 100_000
MAX_DEPTH = 20
TEXT = "tag:yaml.org,2002:str"
PLAIN = {  # what a value without quotes is, unless it is text
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
}


class Malformed(ValueError):
    """Not what a config may be; `where` is the line, to be put behind the name of the file."""

    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.where = "" if line is None else f", line {line}"


def read(path: Path) -> Any:
    """What a file holds. Raises OSError and Malformed."""
    if path.is_fifo() and path.parts[:2] != ("/", "dev"):  # of a shell's <(…) the other end is there
        raise Malformed("is a pipe, not a file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Malformed(f"is over {MAX_BYTES:,} bytes: that is no config")
    try:
        return parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Malformed(f"not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8", line) from error


def parse(text: str) -> Any:
    """One YAML document. Raises Malformed."""
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Malformed(f"not valid YAML (the character U+{error.character:04X})", line) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not valid YAML ({error.problem}); see configs/quickstart.yaml"
        raise Malformed(what, None if mark is None else mark.line + 1) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with fewer types and without aliases, of which a few lines can stand for billions of values."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, re.compile(f"(?:{pattern})$")) for tag, pattern in PLAIN.items()] for first in ("", *"~nNtTfF")
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self._open = 0  # lists and mappings around what is read now

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _malformed(event, f"the alias *{event.anchor} is not read: write the value out")
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            short = tag.replace("tag:yaml.org,2002:", "!!")
            raise _malformed(event, f"the tag {short} is not read: write the value alone")
        if self._open > MAX_DEPTH:
            raise _malformed(event, f"nested more than {MAX_DEPTH} deep: no setting is")
        self._open += 1
        node = super().compose_node(parent, index)
        self._open -= 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        elif isinstance(node, yaml.ScalarNode):
            try:
                system.writable(node.value)
            except ValueError as error:
                raise _malformed(node, f"a value {error}") from error
        return node


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _malformed(key, "a key is text, not a list or a mapping")
        if key.value in lines:
            raise _malformed(key, f"{key.value} is given twice (first on line {lines[key.value]}): keep one")
        lines[key.value] = key.start_mark.line + 1
        key.tag = TEXT


def _malformed(place: Any, what: str) -> Malformed:
    return Malformed(what, place.start_mark.line + 1)
