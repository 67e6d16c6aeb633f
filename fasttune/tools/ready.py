"""The ready configs, and what the JSON schema beside them says of a setting. Nothing heavy is imported: a shell asks.

setting(read_schema(), "train.scheduler")["description"]
"""

import json
import sys
from pathlib import Path
from typing import Any

from fasttune import system

SCHEMA = "fasttune.schema.json"  # beside every config that names it


def folder() -> Path:
    """configs/ of the checkout, or where the wheel puts it."""
    checkout = Path(system.HOME, "configs")
    if (checkout / "quickstart.yaml").is_file():
        return checkout
    return Path(sys.prefix, "share", "fasttune", "configs")


def paths() -> list[Path]:
    """The ready configs, by name."""
    return sorted(folder().glob("*.yaml"))


def read_schema() -> dict[str, Any]:
    """What tools/schema.py makes, as it lies beside the ready configs. Raises OSError and ValueError."""
    return dict(json.loads((folder() / SCHEMA).read_text(encoding="utf-8")))


def section(made: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of a section. Raises KeyError: there is none of this name."""
    return made["definitions"][made["properties"][name]["$ref"].rpartition("/")[2]]  # type: ignore[no-any-return]


def setting(made: dict[str, Any], key: str) -> dict[str, Any]:
    """The schema of `section.name`, or of `name`. Raises KeyError."""
    *sections, leaf = key.split(".")
    for name in sections:
        made = section(made, name)
    return made["properties"][leaf]  # type: ignore[no-any-return]


def keys(made: dict[str, Any]) -> list[str]:
    """All settings as dotted names, in their order."""
    found = []
    for name, entry in made["properties"].items():
        found += [f"{name}.{leaf}" for leaf in section(made, name)["properties"]] if "$ref" in entry else [name]
    return found


def choices(entry: dict[str, Any]) -> list[str]:
    """What a setting may be, where that is a list of words; as YAML has them."""
    found = []
    for branch in [entry, *entry.get("anyOf", []), entry.get("items", {})]:
        found += branch.get("enum", []) + ([branch["const"]] if "const" in branch else [])
        found += [True, False] if branch.get("type") == "boolean" and "const" not in entry else []
    return [word if isinstance(word, str) else json.dumps(word) for word in found]
