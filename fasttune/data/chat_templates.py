"""data.chat_template: a template by its name (chat_templates/NAME.jinja), in a file or as text, put in place of the
tokenizer's. Loaded where one is given.

    put(tokenizer, "chatml")       # training, and whatever reads the saved tokenizer, then uses it

The named ones are written from what their makers say of the format; each begins with the address of that. None writes
BOS: chat.complete puts it in front where the tokenizer does.
"""

import re
from pathlib import Path
from typing import Any

from fasttune import system
from fasttune.errors import DataError, first_line, one_line

FOLDER = Path(__file__).with_name("chat_templates")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
MAX_BYTES = 1 << 20  # of a file; the longest of a published model has 20 kB
CONTROL = re.compile(r"<\|[\w.-]+\|>|<(?:start|end)_of_turn>|</?s>")  # what is meant to be one token
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day"},
]


def read(given: str) -> str:
    """The template that `given` means. Raises DataError where there is none, or no jinja."""
    from fasttune.data import sandbox

    if given in NAMES:
        return (FOLDER / f"{given}.jinja").read_text(encoding="utf-8")
    source = given if "{{" in given or "{%" in given else _of_file(given)
    if not source.strip():
        raise DataError(f"data.chat_template: {one_line(given, 80)!r} is empty; name one of {', '.join(NAMES)}")
    try:
        sandbox.compiled(source)
    except Exception as error:  # whatever jinja2 raises for a wrong one
        line = f" in line {number}" if (number := getattr(error, "lineno", None)) else ""
        what = f"{one_line(given, 80)!r} is no jinja template: {first_line(error)[:120]}{line}"
        raise DataError(f"data.chat_template: {what}; correct it, or name one of {', '.join(NAMES)}") from error
    return source


def put(tokenizer: Any, given: str) -> list[tuple[str, str]]:
    """Make it the tokenizer's template, in place; (what, why) of it, for the person.

    Raises DataError where an answer would end with a control token that this tokenizer would write as several.
    """
    from fasttune.data import chat

    tokenizer.chat_template = read(given)
    template = chat.template_of(tokenizer)
    lacks = [token for token in _control_tokens(template) if len(_ids(tokenizer, token)) != 1]
    for token in CONTROL.findall(template.closing or ""):
        if token in lacks:
            fits = [name for name in NAMES if name != given and _fits(tokenizer, name)]
            raise DataError(
                f"data.chat_template={one_line(given, 40)}: an answer would end with {token}, which this tokenizer "
                f"writes as {len(_ids(tokenizer, token))} tokens, so no model would end with it; "
                f"name one that fits it: {', '.join(fits)}"
            )
    changes = [(given if given in NAMES else one_line(given, 40), "data.chat_template, not the tokenizer's own")]
    if lacks:
        changes.append((f"{', '.join(lacks)[:80]} as ordinary text", "the tokenizer has no such tokens"))
    return changes


def _of_file(given: str) -> str:
    try:
        path = Path(given).expanduser()
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise DataError(f"data.chat_template: {path} has over {MAX_BYTES >> 20} MiB, which no template has")
        return system.read_text(path)
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise DataError(
            f"data.chat_template: {one_line(given, 80)} is no file that can be read ({why}) and no known name; name a "
            f".jinja file, or one of {', '.join(NAMES)}"
        ) from error


def _control_tokens(template: Any) -> list[str]:
    """All that the template writes around three turns."""
    from fasttune.data.formats import Unusable

    try:
        return sorted(set(CONTROL.findall(template.render(CONVERSATION, ask=True))))
    except Unusable:  # its rows will be refused one by one
        return []


def _fits(tokenizer: Any, name: str) -> bool:
    from fasttune.data import chat, sandbox

    special = chat.template_of(tokenizer).special
    text = sandbox.compiled(read(name)).render(messages=CONVERSATION, eos_token=special.get("eos_token") or "")
    return all(len(_ids(tokenizer, token)) == 1 for token in CONTROL.findall(text))


def _ids(tokenizer: Any, token: str) -> list[int]:
    found: list[int] = tokenizer(token, add_special_tokens=False).input_ids
    return found
