"""Held-out rows that are trained on all the same: copies in two files, or the same row twice in one."""

from collections.abc import Iterable, Iterator

import numpy as np

from fasttune.data.batching import Batches, Encoded
from fasttune.data.store import Rows

ROWS_AT_ONCE = 10_000


def warning(batches: Batches, held_out: Iterable[Encoded]) -> str | None:
    """How many of the held-out rows have their prompt, and how many prompt and answer too, among the rows that are
    trained on; None if none. Compared are tokens, so the form of the files does not matter, nor what was cut off.
    """
    held = [(_key(ids), _key(ids[: learned.argmax()], b"prompt")) for ids, learned in held_out]
    wanted = {key for keys in held for key in keys} - {None}
    seen = set[int | None]()
    for rows, (trained, _) in zip(batches.parts, batches.split, strict=True):
        seen.update(key for key in _keys(rows, trained) if key in wanted)
    same = sum(whole in seen for whole, _ in held)
    asked = sum(not seen.isdisjoint(keys) for keys in held)
    if not asked:
        return None
    return (
        f"of {len(held):,} held-out rows {asked:,} have a prompt that is trained on, {same:,} of them with the same "
        "answer: what is measured on them says little about new rows; remove them from one of the two"
    )


def _keys(rows: Rows, trained: np.ndarray) -> Iterator[int | None]:
    """Of the whole of each trained row, and of its prompt: what comes before its first supervised token."""
    ids, starts = np.asarray(rows.ids), rows.starts
    for at in range(0, len(trained), ROWS_AT_ONCE):
        block = trained[at : at + ROWS_AT_ONCE]
        supervised = starts[block[0]] + np.flatnonzero(rows.learned[starts[block[0]] : starts[block[-1] + 1]])
        answers = supervised[np.searchsorted(supervised, starts[block])]
        for start, answer, end in zip(starts[block], answers, starts[block + 1], strict=True):
            yield _key(ids[start:end])
            yield _key(ids[start:answer], b"prompt")


def _key(ids: np.ndarray, kind: bytes = b"") -> int | None:
    """None for an empty prompt, which rows of plain text have."""
    return hash(kind + ids.tobytes()) if len(ids) else None
