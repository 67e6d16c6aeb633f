"""Lists of affixes, as linguists write them: `mag-` is a prefix, `-um-` an infix, `-an` a suffix.

affixes = affixes_of("filipino")      # shipped in affixes/; or a file, of any language
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fasttune.errors import DataError

SHIPPED = Path(__file__).parent / "affixes"


def affixes_of(name_or_path: str | Path) -> tuple[str, ...]:
    """The affixes of a shipped list (`filipino`) or of a file: `mag-`, `-um-`, `-an`, one a line, `#` begins a comment.

    Raises DataError, with the line, for what is not such a list.
    """
    shipped = {path.stem: path for path in SHIPPED.glob("*.txt")}
    path = shipped.get(str(name_or_path)) or Path(os.path.expanduser(name_or_path))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        near = get_close_matches(str(name_or_path), shipped, 1)
        reason = getattr(error, "strerror", None) or "not UTF-8"
        fix = f"did you mean {near[0]}?" if near else f"give a file, or one of those shipped: {', '.join(shipped)}"
        raise DataError(f"data.affixes: {name_or_path} cannot be read ({reason}); {fix}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        affix = line.partition("#")[0].strip()
        if not affix:
            continue
        where = f"data.affixes: {path}, line {number}: {affix!r}"
        if kind_of(affix) is None:
            raise DataError(f"{where} is no affix: write mag- for a prefix, -um- for an infix, -an for a suffix")
        if affix in found:
            raise DataError(f"{where} is in line {found[affix]} already: delete one of them")
        found[affix] = number
    if not found:
        raise DataError(f"data.affixes: {path} holds no affix: write one a line, such as mag-, -um- or -an")
    return tuple(found)


def kind_of(affix: str) -> tuple[Literal["prefix", "infix", "suffix"], str] | None:
    """(kind, text) of an affix as linguists write it; None if it is not written so. `de--` is the prefix `de-`."""
    left, right = affix.startswith("-"), affix.endswith("-")
    text = affix[left : len(affix) - right]
    if not (left or right) or not text.strip("-") or any(letter.isspace() for letter in text):
        return None
    return ("infix" if left and right else "suffix" if left else "prefix"), text


def spellings(affixes: tuple[str, ...]) -> dict[str, str]:
    """Text → affix, for each way an affix stands in a text; `in-/-in` where two are spelled alike."""
    found: dict[str, list[str]] = {}
    for affix in affixes:
        known = kind_of(affix)
        if known is None:
            raise DataError(f"data.affixes: {affix!r} is no affix: write mag- for a prefix, -um- infix, -an suffix")
        kind, text = known
        capital = text.capitalize()
        ways = {"prefix": [text, f" {text}", capital, f" {capital}"], "infix": [text], "suffix": [text, f"{text} "]}
        for way in dict.fromkeys(ways[kind]):
            found.setdefault(way, []).append(affix)
    return {way: "/".join(names) for way, names in found.items()}
