"""What stochastic tokenisation (subword.py) asks of a tokenizer: the bytes of every token, which tokens are ordinary
text, how one is cut in two, and how a piece from the middle of a text is encoded.

For byte-level BPE (Llama 3, GPT-2, SmolLM2: a letter of the vocabulary is a byte) and for BPE and Unigram in
SentencePiece's form (Gemma, Llama 2: the vocabulary is text with ▁ for spaces, and <0xNN> for bytes).
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel

from fasttune.errors import DataError

SPACE = "▁"  # U+2581. Source: https://github.com/google/sentencepiece#whitespace-is-treated-as-a-basic-symbol
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
# Control and unused tokens that are not among the added ones. A name too many costs nothing: that token stays whole.
CONTROL = re.compile(
    r"<\|.*\|>|</?s>|<(unk|pad|bos|eos|cls|sep|mask|unused\w*|reserved\w*)>|\[(UNK|PAD|CLS|SEP|MASK|BOS|EOS|unused\w*)\]"
)
AT_THE_ENDS = ("Prepend", "Strip")  # normalizers

Part = dict[str, Any]  # of a tokenizer, as its JSON says
Split = tuple[int, int]  # the ids of the left and the right part


class Vocabulary:
    """The tokens of a tokenizer, by id. Raises DataError for a tokenizer of another kind."""

    def __init__(self, tokenizer: Tokenizer):
        parts = _parts_around(tokenizer)
        byte_of = _alphabet() if _is_byte_level(tokenizer, parts) else None
        self._letter_of = {byte: letter for letter, byte in byte_of.items()} if byte_of else None
        pieces = tokenizer.get_vocab(with_added_tokens=False)
        added = {token: one.content for token, one in tokenizer.get_added_tokens_decoder().items()}
        unknown = _unknown(tokenizer.model)

        size = 1 + max((*pieces.values(), *added), default=-1)
        self.pieces = [""] * size
        self.token_bytes = [b""] * size  # of control tokens: their name
        self.ordinary = [False] * size  # no control, special, added, unused or byte token
        for piece, token in pieces.items():
            self.pieces[token] = piece
            spelled = _spelled(piece, byte_of)
            self.token_bytes[token] = piece.encode() if spelled is None else spelled
            named = piece[:1] in "<[" and (BYTE.fullmatch(piece) or CONTROL.fullmatch(piece))
            self.ordinary[token] = bool(spelled) and not named and token not in added and token != unknown
        for token, content in added.items():
            self.token_bytes[token] = content.encode()
        self._ids = {piece: token for piece, token in pieces.items() if self.ordinary[token]}
        self._encoder = _for_the_middle(tokenizer, parts)

    def id_of(self, text: str) -> int | None:
        """The ordinary token that is this text, if there is one."""
        if self._letter_of:
            return self._ids.get("".join(self._letter_of[byte] for byte in text.encode()))
        return self._ids.get(text.replace(" ", SPACE))

    def splits(self, token: int) -> tuple[Split, ...]:
        """Each cut of an ordinary token into two ordinary ones: at bytes, in SentencePiece's form at characters."""
        piece, ids = self.pieces[token], self._ids
        if not self.ordinary[token]:
            return ()
        cuts = ((ids.get(piece[:at]), ids.get(piece[at:])) for at in range(1, len(piece)))
        return tuple((left, right) for left, right in cuts if left is not None and right is not None)

    def encode(self, piece: str) -> tuple[int, ...] | None:
        """Ids of a piece from the middle of a text; None where they are not ordinary or have other bytes."""
        ids = tuple(self._encoder.encode(piece, add_special_tokens=False).ids)
        same = self.spell(ids) == piece.encode()
        return ids if same and all(self.ordinary[token] for token in ids) else None

    def spell(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids stand for, with the space before the first word that SentencePiece's decoders drop."""
        return b"".join([self.token_bytes[token] for token in ids])


def _spelled(piece: str, byte_of: dict[str, int] | None) -> bytes | None:
    """The bytes that a piece stands for; None for one that is not written in the byte-level alphabet."""
    if byte_of:
        try:
            return bytes([byte_of[letter] for letter in piece])
        except KeyError:
            return None
    byte = BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def _alphabet() -> dict[str, int]:
    """Letter → byte of byte-level BPE: printable bytes are themselves, the others are what follows U+0100."""
    letters = sorted(ByteLevel.alphabet())
    printable = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = sorted(set(range(256)) - set(printable.values()))
    return printable | dict(zip(letters[len(printable) :], others, strict=True))


def _unknown(model: Any) -> int | None:
    """The id of what stands for text that the vocabulary lacks."""
    if isinstance(model, models.Unigram):
        unknown: int | None = json.loads(model.__getstate__())["unk_id"]
        return unknown
    return None if model.unk_token is None else model.token_to_id(model.unk_token)


def _is_byte_level(tokenizer: Tokenizer, parts: Part) -> bool:
    """Whether a tokenizer is byte-level, and not in SentencePiece's form. Raises DataError if it is neither."""
    model, inner = tokenizer.model, list(_inner(parts["normalizer"])) + list(_inner(parts["pre_tokenizer"]))
    byte_level = any(part["type"] == "ByteLevel" for part in inner)
    spaces = any(part["type"] == "Metaspace" or part.get("content") == SPACE for part in inner)
    marked = any(getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if not isinstance(model, models.BPE | models.Unigram) or marked or not (byte_level or spaces):
        raise DataError(
            f"data.tokenization: this model's tokenizer ({type(model).__name__}) is neither byte-level BPE nor in "
            "SentencePiece's form, which stochastok and patok are for: set data.tokenization=vanilla"
        )
    if getattr(model, "dropout", None) or getattr(model, "alpha", None):
        raise DataError(
            "data.tokenization: this model's tokenizer draws tokens at random by itself, without a seed: set "
            "model.dropout (Unigram: alpha) to null in its tokenizer.json"
        )
    return byte_level


def _parts_around(tokenizer: Tokenizer) -> Part:
    """A tokenizer's JSON without its model, which may be 30 MB of it."""
    hollow = Tokenizer(models.BPE())
    hollow.normalizer, hollow.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    parts: Part = json.loads(hollow.to_str())
    return parts


def _inner(part: Part | None) -> Iterator[Part]:
    """A part of a tokenizer and all that it is made of."""
    if part is not None:
        yield part
        for inner in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from _inner(inner)


def _for_the_middle(tokenizer: Tokenizer, parts: Part) -> Tokenizer:
    """The tokenizer without what it does at a text's ends (a space before the first word, BOS, stripping, a limit)."""
    for part in _inner(parts["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    outer: Part = {"type": "Sequence", "normalizers": [parts["normalizer"]] if parts["normalizer"] else []}
    for part in _inner(outer):
        if "normalizers" in part:
            part["normalizers"] = [inner for inner in part["normalizers"] if inner["type"] not in AT_THE_ENDS]
    parts["normalizer"] = outer
    hollow, encoder = Tokenizer.from_str(json.dumps(parts)), Tokenizer(tokenizer.model)
    encoder.normalizer, encoder.pre_tokenizer = hollow.normalizer, hollow.pre_tokenizer
    return encoder
