"""What is said of a setting that is wrong, in one line each; the tables are hints.yaml. Imported only when one is."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from fasttune.errors import one_line

_tables = yaml.safe_load(Path(__file__).with_name("hints.yaml").read_text(encoding="utf-8"))
BOUNDS: dict[str, str] = _tables["bounds"]
NAMES: dict[str, str] = _tables["names"]
NOT_SUPPORTED: dict[str, str] = _tables["not_supported"]
OTHER_TOOLS = {name: f" (did you mean {ours}?)" for ours, names in NAMES.items() for name in names.split()} | {
    name: f"; not supported{': ' if why else ''}{why}" for why, names in NOT_SUPPORTED.items() for name in names.split()
}
WRONG_BRANCH = ("string_type", "dict_type", "list_type")  # of a value that may be text, or a mapping or list


def in_words(errors: list[Any], known: list[str]) -> list[str]:
    """A line for each of pydantic's errors; `known`: our settings as dotted names."""
    right = [item for item in errors if not _of_wrong_branch(item)]
    told = {item["loc"][:2] for item in right}
    return [_in_words(item, known) for item in errors if item in right or item["loc"][:2] not in told]


def _of_wrong_branch(item: Any) -> bool:
    return item["type"] in WRONG_BRANCH or (item["type"] == "literal_error" and isinstance(item["input"], list))


def _in_words(item: Any, known: list[str]) -> str:
    branch = r"function-|literal\[|list\[|dict\[|(bool|int|str|float)$"  # of a union: no part of the key
    key = ".".join(part for part in map(str, item["loc"]) if not re.match(branch, part))
    value = one_line(repr(item["input"]), 100)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown setting{_unknown(key, known)}"
    if item["type"] == "missing":
        return f"{key}: is required; add it to the config or give {key}=… on the command line"
    if item["type"] == "model_type":
        return f"{key}: is a section, {key}.…=… sets one thing in it; got {value}"
    if item["input"] is None:
        return f"{key}: is null; give a value, or leave it out"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message.partition(", unable to")[0]
    why = next((f" ({why})" for name, why in BOUNDS.items() if "than" in item["type"] and key.startswith(name)), "")
    return f"{key}: {message[0].lower()}{message[1:]}{why}, got {value}"


def _unknown(key: str, known: list[str]) -> str:
    section, _, leaf = key.replace("-", "_").rpartition(".")
    if leaf.lower() in OTHER_TOOLS:
        return OTHER_TOOLS[leaf.lower()]
    leaves = {name.rpartition(".")[2] for name in known} | {name.partition(".")[0] for name in known}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    ours = [name for name in known if near and name.rpartition(".")[2] == near[0]] or near
    ours.sort(key=lambda name: name.rpartition(".")[0] != section)
    return f" (did you mean {ours[0]}?)" if ours else " (docs/settings.md has all of them)"
