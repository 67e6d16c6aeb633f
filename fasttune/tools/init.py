"""`fasttune init [RECIPE]`: the ready configs, and one of them as a file to edit, with every setting explained.

Each setting begins a line, its meaning stands behind it. What the recipe leaves at its default is there, too, with a #
in front: taking that away is enough.
"""

import argparse
import difflib
import os
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from fasttune import config, strict_yaml, system, terminal
from fasttune.config import SECTIONS, TRUST, Config
from fasttune.errors import FasttuneError, OutputError, one_line
from fasttune.tools import ready, schema

WIDEST = 110  # characters of a line
COMMENT_AT = 34  # column
LEGEND = (
    "A setting behind # has its default: remove the # to change it. Any of them is also key=value on the command line."
)


@dataclass(frozen=True)
class Recipe:
    """A ready config. `command` trains with it; `comments`: the lines at its top, of which `about` is the first."""

    name: str
    about: str
    command: str
    comments: list[str]
    path: Path


def recipes() -> list[Recipe]:
    """All ready configs, by name. Raises FasttuneError where the package was installed without them."""
    found = [read(path) for path in ready.paths()]
    if not found:
        raise FasttuneError(f"init: no ready configs in {ready.folder()}; install fasttune into a virtual environment")
    return found


def read(path: Path) -> Recipe:
    """What the comments at the top of a ready config say: the command that runs it, then what it is."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    command = re.search(rf"((?:[A-Z0-9_]+=\S+ )*)\S*(fasttune train configs/{re.escape(path.name)}[^)]*)", lines[0])
    comments = [line for line in lines[1:] if f"# {line}" != schema.LINE]
    while comments and not comments[0]:
        del comments[0]
    assert command and comments, path
    return Recipe(path.stem, comments[0], "".join(command.groups()), comments, path)


def find(name: str) -> Recipe:
    """Raises FasttuneError, with the nearest name, for one that is not there."""
    known = {recipe.name: recipe for recipe in recipes()}
    if name not in known:
        near = difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FasttuneError(f"init: no ready config {name}{hint}; `fasttune init` lists them")
    return known[name]


def run(options: argparse.Namespace) -> Any:
    """List the ready configs, or write one; what --json prints."""
    if options.recipe is None and options.out is not None:
        raise FasttuneError(f"--out {options.out} would be ignored: name a ready config; `fasttune init` lists them")
    if options.recipe is not None:
        written = write(options.recipe, options.out or "config.yaml")
        show_written(written)
        return written
    found = recipes()
    if not options.json:
        show(found)
    return [{"name": recipe.name, "about": recipe.about} for recipe in found]


def show(found: list[Recipe]) -> None:
    """On stdout, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for recipe in found:
        table.add_row(recipe.name, recipe.about)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "\n`fasttune init NAME` writes one, as config.yaml or what --out names, with every setting explained."
    )


def show_written(written: dict[str, Any]) -> None:
    """On stderr: what is there now, and what to do with it."""
    told = f"{written['config']}: {written['recipe']}, with every setting explained ({ready.SCHEMA} is for editors)"
    told = terminal.plain(f"{told}\nTrain with it:  {written['command']}")
    terminal.console.print(told, markup=False, highlight=False, soft_wrap=True)


def write(name: str, out: str) -> dict[str, Any]:
    """Write the config and, beside it, the schema that editors complete it with; what was written, and the command.

    Raises OutputError where `out` is there already or cannot be written, FasttuneError for an unknown recipe.
    """
    recipe, path = find(name), Path(out).expanduser()
    beside = path.parent / ready.SCHEMA
    if os.path.lexists(path):
        raise OutputError(f"--out {out}: is there already; name another file, or remove it")
    if os.path.lexists(beside) and not _is_ours(beside):
        raise OutputError(f"--out {out}: {beside} is another program's file; write into another folder")
    shown = f"./{path}" if str(path).startswith("-") else str(path)  # ~ is written out: in quotes a shell keeps it
    command = _in_place_of(recipe, recipe.command, shown)
    try:
        system.write_atomic(beside, schema.as_text(schema.schema()).encode())
        system.write_atomic(path, text(recipe, shown).encode())
    except OSError as error:
        raise OutputError(
            f"--out {out}: cannot be written ({error.strerror}); name a file in a folder of yours"
        ) from error
    return {"config": str(path), "schema": str(beside), "recipe": name, "command": command}


def _is_ours(path: Path) -> bool:
    """Whether a schema was written by this command, by this version or an older one."""
    try:
        return f'"title": "{schema.TITLE}"' in system.read_text(path)
    except (OSError, UnicodeDecodeError):
        return False


def text(recipe: Recipe, out: str) -> str:
    """The file: the command, the schema, what the recipe is, and every setting. It loads to the recipe's Config."""
    given, loaded = strict_yaml.read(recipe.path), config.load(recipe.path)
    made = schema.schema()
    comments = [_in_place_of(recipe, line, out) for line in recipe.comments]
    head = [f"# {_in_place_of(recipe, recipe.command, out)}", schema.LINE, "#"]
    lines = head + [f"# {line}".rstrip() for line in [*comments, "", LEGEND]] + [""]
    top = [name for name in Config.model_fields if name not in SECTIONS]
    for name in top:
        lines += _setting(name, ready.setting(made, name), "", given, getattr(loaded, name))
    for section in SECTIONS:
        values = given.get(section) or {}
        entries = ready.section(made, section)
        lines += ["", f"# {entries['description']}", f"{section}:"]
        for name, entry in entries["properties"].items():
            if f"{section}.{name}" != TRUST:  # not taken from a file
                lines += _setting(name, entry, "  ", values, getattr(getattr(loaded, section), name))
    return "\n".join(lines) + "\n"


def _in_place_of(recipe: Recipe, line: str, out: str) -> str:
    """A line of the recipe's comments that is about the new file instead."""
    told = line.replace(f"configs/{recipe.path.name}", shlex.quote(out)).replace(".venv/bin/fasttune", "fasttune")
    return one_line(told, system.LONGEST_PATH)  # a name may hold a line break, a comment must not


def _setting(name: str, entry: dict[str, Any], indent: str, given: dict[str, Any], value: Any) -> list[str]:
    """The line of a setting and behind it its meaning, continued below that; `given`: the recipe's text of all."""
    default = _as_yaml(entry["default"]) if "default" in entry else ""
    number = isinstance(value, int | float) and isinstance(given.get(name), str)  # 1.0e-4 stays that
    now = given[name] if number else _as_yaml(value)
    setting = f"{indent}{name}: {now}" if name in given else f"{indent}# {name}: {default}"
    words, told = ready.choices(entry), entry["description"]
    if len(words) > 1 and words != ["true", "false"]:
        told += f" ({', '.join(words)})"
    if name in given and default not in ("", "null") and value != entry["default"]:
        told += f"; default {default}"
    if len(setting) >= COMMENT_AT + 20:
        return [setting, *_comment(told, "")]
    return _comment(told, setting)


def _comment(told: str, setting: str) -> list[str]:
    first, later = f"{setting:<{COMMENT_AT}} # ", f"{'':{COMMENT_AT}} # "
    return textwrap.wrap(told, WIDEST, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _as_yaml(value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("...\n").strip()
