"""Long texts, encoded in windows that overlap: a tokenizer takes 200 to 300 times the size of a text at once."""

from array import array
from bisect import bisect_left, bisect_right
from typing import Any

from fasttune.data.chat import Span

OVERLAP = 1 << 12  # characters
AGREE = 8  # tokens


def encode(tokenizer: Any, text: str, window: int, enough: int | None) -> "Joined":
    """The tokens of a text, `window` characters at once; at least the first `enough` of them (None: all)."""
    joined = Joined()
    for at in range(0, len(text), window - OVERLAP):
        encoding = tokenizer.encode(text[at : at + window], add_special_tokens=False)
        joined.add(array("i", encoding.ids), array("q", [at + start for start, _ in encoding.offsets]))
        if enough is not None and len(joined.ids) >= enough + OVERLAP:
            break  # the last tokens of a window are not yet sure
    return joined


class Joined:
    """What an Encoding of a long text would say. starts: the first character of each token.

    Two windows are joined where they agree on AGREE tokens in a row: there the beginning of a window is forgotten, so
    the tokens are those of the whole text.
    """

    def __init__(self) -> None:
        self.ids, self.starts = array("i"), array("q")

    @property
    def offsets(self) -> list[Span]:
        return [(start, start) for start in self.starts]

    def char_to_token(self, at: int) -> int:
        last = max(0, bisect_right(self.starts, at) - 1)
        return bisect_left(self.starts, self.starts[last])  # the first token of a character that has several

    def token_to_chars(self, token: int) -> Span:
        return self.starts[token], self.starts[token]

    def add(self, ids: "array[int]", starts: "array[int]") -> None:
        """The tokens of the next window."""
        old, new = 0, 0
        if self.ids:
            old, new = len(self.ids), bisect_left(starts, self.starts[-1] + 1)  # where they agree nowhere
            for at in range(bisect_left(starts, starts[0] + OVERLAP // 4), len(ids)):
                was = bisect_left(self.starts, starts[at])
                if self.starts[was : was + AGREE] == starts[at : at + AGREE] and (
                    self.ids[was : was + AGREE] == ids[at : at + AGREE]
                ):
                    old, new = was, at
                    break
        self.ids[old:], self.starts[old:] = ids[new:], starts[new:]
