"""Rows that come more than once, by their tokens: so neither the form of the files matters nor what was cut off.

    found = of(parts)                  # one Copies for each data set
    found[0].rows, found[0].numbers    # how many rows have an earlier copy, and which

Only two hashes a row are kept, whatever the rows hold. The first copy stays, that of the data set that is named first.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from fasttune.data.store import Rows

HASH_BYTES = 8  # of ten million rows, two different ones are taken for one with a chance of 3 in a million


@dataclass(frozen=True)
class Copies:
    """Of one data set. rows: those of it with the prompt and the answer of an earlier one; prompts: with its prompt,
    whatever the answer; *_elsewhere: of these, those whose first one is in an earlier data set.

    numbers: of `rows` in their source. Plain text has no prompts. The pieces of a row that was split are one row.
    """

    rows: int
    rows_elsewhere: int
    prompts: int
    prompts_elsewhere: int
    numbers: np.ndarray


def of(parts: list[Rows]) -> list[Copies]:
    """The copies in each data set, of earlier rows in it and in those before it."""
    hashed = [_hashes(rows) for rows in parts]
    which = np.repeat(np.arange(len(parts)), [len(numbers) for numbers, _, _ in hashed])
    whole, whole_elsewhere = _again(np.concatenate([each for _, each, _ in hashed]), which)
    asked, asked_elsewhere = _again(np.concatenate([each for _, _, each in hashed]), which)
    found = []
    for part, (numbers, _, _) in enumerate(hashed):
        own = which == part
        rows, rows_elsewhere, prompts, prompts_elsewhere = (
            int((flags & own).sum()) for flags in (whole, whole_elsewhere, asked, asked_elsewhere)
        )
        found.append(Copies(rows, rows_elsewhere, prompts, prompts_elsewhere, numbers[whole[own]]))
    return found


def _hashes(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers, hash of the whole row, hash of its prompt) of the rows of a data set; zeros where there is no prompt.

    A prompt is what comes before the first supervised token; nothing predicts the first token, which alone is none.
    """
    ids = np.asarray(rows.ids)  # a slice of a memory map takes longer
    supervised = None if rows.supervised is None else np.asarray(rows.supervised)
    first = np.flatnonzero(np.diff(rows.numbers, prepend=rows.numbers[:1] - 1))  # a row that was split has several
    last = np.append(first[1:], len(rows))
    whole, prompts = np.zeros(len(first), np.uint64), np.zeros(len(first), np.uint64)
    ends = (rows.starts[at].tolist() for at in (first, first + 1, last))
    for at, (start, end_of_piece, end) in enumerate(zip(*ends, strict=True)):
        before = 0 if supervised is None else int(supervised[start:end_of_piece].argmax())
        whole[at] = _hash(ids[start:end])
        prompts[at] = _hash(ids[start : start + before]) if before > 1 else 0
    return rows.numbers[first], whole, prompts


def _hash(ids: np.ndarray) -> int:
    tokens = np.asarray(ids, np.int32)  # files of tokens may hold another type
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=HASH_BYTES).digest())


def _again(hashes: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each hash, whether it came before, and whether first in another data set; `which`: that of each, ascending."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = (first[inverse] != np.arange(len(hashes))) & (hashes != 0)
    return again, again & (which[first[inverse]] != which)
