"""What stands beside a row's own columns and turns: flags not to train on something, answers rated bad, pictures.

None of it may be passed over in silence: it is followed, refused by its name, or named as not used.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fasttune.errors import DataError, short

Row = dict[str, Any]

FLAGS = ("weight", "loss_weight", "train", "loss", "masked")  # of a turn, or of a whole row; `masked` is torchtune's
LIKE_FLAGS = ("train", "loss", "weight", "mask", "learn")  # what a part of the name of another flag begins with
SAID = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
USED = ("system", "history", "tools", "functions")  # beside every form but text
PREFERENCE = re.compile(r"(chosen|rejected).*")
MEDIA = re.compile(r"(image|picture|audio|sound|video)s?(_(path|url|file)s?)?")
MEDIA_MARKS = ("<image>", "<audio>", "<video>")  # in a text alone they may as well be markup
QUESTIONS = {"prompt": "completion", "question": "answer", "query": "response", "instruction": "output"}
NAME_CHARACTERS = 60
NOT_READ = "not read"  # stands for the values of a column that means nothing here


def is_read(name: str) -> bool:
    """Whether a column means something beside those of the forms."""
    names = (*USED, *FLAGS, "input", "options", "label", "kto_tag")
    return name in names or bool(PREFERENCE.fullmatch(name) or MEDIA.fullmatch(name))


def check(row: Row, place: str) -> None:
    """Raise DataError for rows that show which answer is the better one, and for those about pictures or sound."""
    compared = [name for name, value in row.items() if PREFERENCE.fullmatch(name) and value]
    if compared:
        raise DataError(
            f"data: {place} is preference data ({', '.join(compared)[:60]}), which would be trained on as if all of it "
            f"were good; to train on the good answers alone {_without_bad(row)}"
        )
    for name in ("label", "kto_tag"):
        if name in row and (row[name] is False or str(row[name]).lower() == "false"):
            raise DataError(
                f"data: {place} is preference data: {name} is false, so its answer is a bad one; keep the rows where "
                "it is true"
            )
    check_media(row, place)


def check_media(row: Row, place: str) -> None:
    """Raise DataError for a row about pictures, sound or video."""
    for name, value in row.items():
        if MEDIA.fullmatch(name) and value and value != [None]:
            raise DataError(
                f"data: {place} has {name}: pictures, sound and video cannot be used; remove such rows, or the column "
                "if the text says all"
            )


def check_text(text: str, place: str) -> None:
    """Raise DataError for half a character (a lone surrogate), which JSON can write and no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"data: {place} holds half a character, {half} after {text[: error.start][-20:]!r}: a text was cut there; "
            "write the whole one, or leave it out"
        ) from None


def _without_bad(row: Row) -> str:
    """What to do so that the good answers are trained on: where they are the chosen ones, to name their column."""
    if "chosen" not in row:
        return "remove such columns"
    chosen = row["chosen"]
    answer = next((QUESTIONS[name] for name in QUESTIONS if name in row), "text")
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict):
        whole = "prompt" not in row or chosen[0].get("role") in ("system", "user")
        answer = "messages" if whole else answer
    return f"set data.columns={{{answer}: chosen}}"


def weight(marked: Row, place: str) -> dict[str, int]:
    """{"weight": 0} for a turn or a part of one that its flags say not to train on, else {}.

    Raises DataError for a flag that is not known or says something else.
    """
    trained = True
    for key, value in marked.items():
        if value is None:
            continue
        if key in FLAGS:
            said = SAID.get(str(value).strip().lower())
            if said is None:
                raise DataError(f"data: {place}: {key} is {short(value)}; it can be 1 or true, 0 or false")
            trained = trained and said is not (key == "masked")
        elif value and _is_like_a_flag(key):
            raise DataError(
                f"data: {place}: a turn has {key[:60]}, which is not known; whole turns are left out with weight: 0"
            )
    return {} if trained else {"weight": 0}


@lru_cache
def _is_like_a_flag(key: str) -> bool:
    return any(part.startswith(LIKE_FLAGS) for part in key.lower().split("_"))


def is_left_out(row: Row) -> bool:
    """Whether a flag of a row says not to train on it."""
    return any(SAID.get(str(row[key]).strip().lower()) is False for key in FLAGS[:-1] if key in row)


def not_used(row: Row, own: tuple[str, ...]) -> set[str]:
    """Names, cut to a readable length, of what is not used of a row whose form has the columns `own`."""
    return {name[:NAME_CHARACTERS] for name in _not_used(row, own)}


def _not_used(row: Row, own: tuple[str, ...]) -> Iterator[str]:
    """Names of what says something and is not used of a row whose form has the columns `own`."""
    used = own if own == ("text",) else (*own, *USED, "input" if "instruction" in own else "")
    for key, value in row.items():
        if key not in used and value not in (None, "", []) and key not in ("label", "kto_tag"):
            yield f"column {key}"
    turns: Any = row.get(own[0])
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        role = turn.get("role", turn.get("from"))
        if "from" in turn:
            yield from (f"{key} of a turn" for key in turn if key not in ("from", "value", *FLAGS) and turn[key])
        if role in ("user", "human"):
            yield from (f"{key}: true of a {role} turn" for key in ("train", "loss") if turn.get(key) is True)
        if number == 0 and role == "system" and row.get("system") not in (None, "", *turn.values()):
            yield "column system beside a system turn"
