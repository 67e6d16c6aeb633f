#!/usr/bin/env python3
"""Every setting of a run with its default and meaning:  python scripts/settings.py --write

Writes docs/settings.md, and the JSON schema that configs name, from fasttune/settings.py, the only place where settings
are declared; tests compare both with it.
"""

import sys
import typing
from pathlib import Path

import yaml
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fasttune.config import Config  # noqa: E402
from fasttune.settings import Section, is_section  # noqa: E402
from fasttune.tools import ready, schema  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings
Of a YAML file, and on the command line as `section.name=value`. Unknown ones are refused with the nearest name.
`auto` is decided for the machine, and printed with its reason. `lora=null` leaves out a section that the file has.
`010`, `1:30` and `on` are no numbers, a key given twice is an error, a number far from any use is refused with
the reason.
This page is written by `python scripts/settings.py --write`.
"""


def page() -> str:
    sections = {"": [name for name, field in Config.model_fields.items() if not is_section(field.annotation)]}
    text = HEAD + table("", Config, sections[""])
    for name, field in Config.model_fields.items():
        if is_section(section := field.annotation):
            about = (section.__doc__ or "").strip()
            text += f"\n## {name}\n{about}\n" + table(f"{name}.", section, list(section.model_fields))
    return text


def table(prefix: str, section: type[Section], names: list[str]) -> str:
    lines = ["", "| setting | default | |", "|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        default = "**required**" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        lines.append(f"| `{prefix}{name}` | {default} | {cell(field)} |")
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """As YAML has it."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def cell(field: FieldInfo) -> str:
    """The description, and the values to choose from."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    values = [value for kind in kinds if typing.get_origin(kind) is typing.Literal for value in typing.get_args(kind)]
    choices = ", ".join(f"`{value}`" for value in dict.fromkeys(values)) if len(values) > 1 else ""
    return "; ".join(filter(None, [(field.description or "").replace("|", "\\|"), choices]))


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
        (ROOT / "configs" / ready.SCHEMA).write_text(schema.as_text(schema.schema()), encoding="utf-8")
    else:
        print(page(), end="")
