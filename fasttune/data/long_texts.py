"""Texts of many MB → tokens, without the 200 to 300 times their size that a tokenizer takes for a text at once.

A long text is encoded in windows that overlap. Two of them are joined where they agree on AGREE tokens in a row: there
the beginning of a window is forgotten, so the tokens are those of the whole text.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from typing import Any

WINDOW = 1 << 18  # characters; longer texts are encoded in windows
OVERLAP = 1 << 12
AGREE = 8  # tokens


class Joined:
    """What an Encoding of the whole text would say. starts: the first character of each token."""

    def __init__(self) -> None:
        self.ids, self.starts = array("i"), array("q")

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return [(start, start) for start in self.starts]

    def char_to_token(self, at: int) -> int:
        last = max(0, bisect_right(self.starts, at) - 1)
        return bisect_left(self.starts, self.starts[last])  # the first token of a character that has several

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.starts[token], self.starts[token]

    def add(self, ids: array[int], starts: array[int]) -> None:
        """The tokens of the next window."""
        new = bisect_left(starts, starts[0] + OVERLAP // 4) if self.ids else 0
        while new < len(ids) and self.ids:
            old = bisect_left(self.starts, starts[new])
            if self.starts[old : old + AGREE] == starts[new : new + AGREE] and (
                self.ids[old : old + AGREE] == ids[new : new + AGREE]
            ):
                break
            new += 1
        else:
            new = bisect_left(starts, self.starts[-1] + 1) if self.ids else 0
            old = len(self.ids)
        self.ids[old:], self.starts[old:] = ids[new:], starts[new:]


def encode_batch(tokenizer: Any, texts: list[str], enough: int | None) -> list[Any]:
    """As tokenizer.encode_batch without special tokens. Of a long text only `enough` tokens are wanted (None: all)."""
    short = iter(tokenizer.encode_batch([text for text in texts if len(text) <= WINDOW], add_special_tokens=False))
    return [next(short) if len(text) <= WINDOW else _joined(tokenizer, text, enough) for text in texts]


def _joined(tokenizer: Any, text: str, enough: int | None) -> Joined:
    joined = Joined()
    for at in range(0, len(text), WINDOW - OVERLAP):
        encoding = tokenizer.encode(text[at : at + WINDOW], add_special_tokens=False)
        joined.add(array("i", encoding.ids), array("q", [at + start for start, _ in encoding.offsets]))
        if enough is not None and len(joined.ids) >= enough + OVERLAP:
            break  # the last tokens of a window are not yet sure
    return joined
