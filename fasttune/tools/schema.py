"""The JSON schema of a config file, from the settings themselves: editors complete and check with it.

    fasttune schema > fasttune.schema.json

A config names the copy that lies beside it, in a comment that the YAML language server of VS Code, Neovim … reads. That
works without a network, on any machine, and for everyone who gets the folder; no path of one machine is in the file.
Draft 7 is what that server reads in every release: https://github.com/redhat-developer/yaml-language-server#features
"""

import argparse
import json
from typing import Any

from fasttune.config import SECTIONS, TRUST, Config
from fasttune.settings import Section, is_section
from fasttune.tools.ready import SCHEMA, setting

LINE = f"# yaml-language-server: $schema={SCHEMA}"  # docs: https://github.com/redhat-developer/yaml-language-server
TITLE = "A config of fasttune"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print the schema, unless --json does."""
    made = schema()
    if not options.json:
        print(as_text(made), end="")
    return made


def schema() -> dict[str, Any]:
    """JSON schema (draft 7) of what `config.load` takes from a file, but for what two settings say of each other.

    In `definitions` one schema a section. Every setting has its meaning, default and bounds.
    """
    made = Config.model_json_schema(ref_template="#/definitions/{model}")
    sections = made.pop("$defs")
    _complete(made, Config)
    for field in Config.model_fields.values():
        if is_section(field.annotation):
            _complete(sections[field.annotation.__name__], field.annotation)
    for name in SECTIONS:
        if name not in made["required"]:  # null is a section that is not there
            sections[made["properties"][name]["$ref"].rpartition("/")[2]]["type"] = ["object", "null"]
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": TITLE}
    made = {**head, **{key: value for key, value in made.items() if key != "title"}, "definitions": sections}
    setting(made, TRUST)["const"] = False  # true is not taken from a file
    return made


def _complete(made: dict[str, Any], kind: type[Section]) -> None:
    """Defaults that are lists or mappings, which pydantic leaves out; of a section's own default nothing is said."""
    for name, field in kind.model_fields.items():
        entry = made["properties"][name]
        if is_section(field.annotation):
            entry.pop("default", None)
        elif not field.is_required():
            entry["default"] = field.get_default(call_default_factory=True)


def as_text(made: dict[str, Any]) -> str:
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"
