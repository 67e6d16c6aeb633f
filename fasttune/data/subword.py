"""Stochastic tokenisation: the same bytes in other tokens, so that a model learns what words are made of.

    how = Splitting("patok", affixes=affixes_of("filipino"))
    splitter = Splitter(tokenizer, how)                        # a tokenizers.Tokenizer
    ids = splitter.apply(ids, np.random.default_rng((seed, draw, document)))

stochastok   tokens are split at random. Source: https://github.com/anyasims/stochastok (arXiv 2506.01687)
patok        windows of tokens are joined and cut at an affix and at a doubled syllable, then tokens that are no
             affix are split at random. Source: https://github.com/raileymontalan/filipino-morphology-llm
Both work on ids, which are never decoded and encoded again as a whole: that would undo it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fasttune.data.affix_lists import spellings
from fasttune.data.chat import Template
from fasttune.data.vocabulary import Split, Vocabulary

# Source of the numbers: src/tokenization/patok_morphology.py of the repository above
UP_TO_2, UP_TO_3 = 0.35, 0.70  # share of windows of two tokens, and of two or three; the rest are of four
KEEP_AFFIX = 0.95  # how often a window with an affix token is refused
KEEP_AFFIX_BEGINNING = 0.75  # the same where the affix is also the beginning of a longer one (ma- of mag-)
CUT_AT_AFFIX = 0.95
TRIES = 100  # windows drawn for one attempt
DOUBLED = re.compile(r"([^\W\d_]{2})(?=\1)", re.IGNORECASE)  # two letters twice: gaganda, Gaganda
REMEMBERED = 2**15  # texts of windows, and pieces: 10 MB a process

Uniform = Callable[[], float]  # the next random number in [0, 1)


@dataclass(frozen=True)
class Splitting:
    """How documents are tokenised again. What the mode does not use is set to its default: equal work is equal."""

    mode: Literal["stochastok", "patok"]
    stochastok_p: float = 0.1  # stochastok: attempts to split, as a share of a document's tokens
    expand_share: float = 0.3  # patok: the same
    contract_share: float = 0.3  # patok: windows, as a share of a document's tokens
    affixes: tuple[str, ...] = ()  # patok: as linguists write them, from `affixes_of`

    def __post_init__(self) -> None:
        unused = ("expand_share", "contract_share", "affixes") if self.mode == "stochastok" else ("stochastok_p",)
        for name in unused:
            object.__setattr__(self, name, getattr(type(self), name))

    def splitter(self, tokenizer: Tokenizer) -> "Splitter":
        return Splitter(tokenizer, self)


class Splitter:
    """Tokenises documents again and counts what it did. Raises DataError for a tokenizer or affixes of another kind.

    counts   `tokens before`, `tokens after`
             attempts to split: `splits`, `wasted attempts` (no cut of the token gives two others, or it is an affix)
             patok: `windows`; of them left as they were: `no window` (all tries refused), `windows that cut a
             character`, `windows encoded otherwise` (to other bytes); `windows refused`: tries that hit an affix;
             `affix: mag-`, `doubled syllables`: where windows were cut
    """

    def __init__(self, tokenizer: Tokenizer, how: Splitting):
        self.counts: Counter[str] = Counter()
        self._how, self._tokenizer = how, tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._splits: dict[int, tuple[Split, ...]] = {}
        if how.mode == "patok":
            self._affixes = {text: f"affix: {affix}" for text, affix in spellings(how.affixes).items()}
            self._beginnings = {text[:end] for text in self._affixes for end in range(1, len(text) + 1)}
            kept = self._affix_tokens()
            self._splits |= dict.fromkeys(kept, ())
            # By id; the last, -1, is the border of a document
            ordinary = enumerate(self._vocabulary.ordinary)
            self._refusal = [*(kept.get(token, 0.0) if text else 1.0 for token, text in ordinary), 1.0]
            self._matches = lru_cache(REMEMBERED)(self._find_affixes)
            self._encode = lru_cache(REMEMBERED)(self._encode_piece)

    def document(self, ids: list[int], template: Template, seed: tuple[int, ...], counts: Counter[str]) -> list[int]:
        """As `apply`, of a document with its BOS and EOS, which stay; `counts` gets what was counted, by our names."""
        of = self._tokenizer.token_to_id
        first = int(bool(template.bos) and ids[:1] == [of(template.bos)])
        last = len(ids) - int(bool(template.eos) and ids[-1:] == [of(template.eos)])
        inside = self.apply(ids[first:last], np.random.default_rng(seed))
        counts.update({f"tokenization: {name}": count for name, count in self.counts.items()})
        self.counts.clear()
        return [*ids[:first], *inside, *ids[last:]]

    def apply(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        """Other ids with the same bytes, for the ids of one document without BOS and EOS; only `rng` decides which."""
        how, uniform = self._how, _numbers(rng).__next__
        self.counts["tokens before"] += len(ids)
        if how.mode == "stochastok":
            ids = self._split(ids, how.stochastok_p, uniform)
        else:
            ids = self._split(self._contract(ids, uniform), how.expand_share, uniform)
        self.counts["tokens after"] += len(ids)
        return ids

    def _split(self, ids: list[int], share: float, uniform: Uniform) -> list[int]:
        """⌊share · tokens⌋ times a token of the sequence as it is then, each as likely, is cut in two, if it can be.

        Right parts stand at the end of `tokens`, `after` says behind which: all are as likely wherever they stand.
        """
        splits, tokens, attempts = self._splits, list(ids), int(share * len(ids))
        after: dict[int, int] = {}
        for _ in range(attempts):
            at = int(uniform() * len(tokens))
            token = tokens[at]
            if token not in splits:
                splits[token] = self._vocabulary.splits(token)
            if ways := splits[token]:
                tokens[at], right = ways[int(uniform() * len(ways))]
                if at in after:
                    after[len(tokens)] = after[at]
                after[at] = len(tokens)
                tokens.append(right)
        done = len(tokens) - len(ids)
        self.counts["splits"] += done
        self.counts["wasted attempts"] += attempts - done
        result, start = [], 0
        for first in sorted(at for at in after if at < len(ids)):
            result += ids[start:first]
            at = first
            while at >= 0:
                result.append(tokens[at])
                at = after.get(at, -1)
            start = first + 1
        return result + ids[start:]

    def _contract(self, ids: list[int], uniform: Uniform) -> list[int]:
        """⌊share · tokens⌋ times a window of a few tokens is joined, cut and encoded, in the sequence as it is then."""
        counts, document, windows = self.counts, Sequence(ids), int(self._how.contract_share * len(ids))
        counts["windows"] += windows
        for _ in range(windows):
            drawn = uniform()
            places = self._window(document, 2 if drawn < UP_TO_2 else 3 if drawn < UP_TO_3 else 4, uniform)
            if not places:
                counts["no window"] += 1
                continue
            try:
                text = self._vocabulary.spell([document.tokens[at] for at in places]).decode()
            except UnicodeDecodeError:
                counts["windows that cut a character"] += 1
                continue
            found = self._matches(text)
            affix, pieces = "", [text]
            if found and uniform() < CUT_AT_AFFIX:
                start, end, affix = found[int(uniform() * len(found))]
                pieces = [piece for piece in (text[:start], text[start:end], text[end:]) if piece]
            encoded = [part for part in map(self._encode, pieces) if part]
            if len(encoded) < len(pieces):
                counts["windows encoded otherwise"] += 1
                continue
            document.replace(places, [token for part in encoded for token in part.ids])
            if affix:
                counts[affix] += 1
            for part in encoded:
                if part.doubled:
                    counts["doubled syllables"] += 1
        return document.in_order()

    def _window(self, document: "Sequence", size: int, uniform: Uniform) -> list[int] | None:
        """Where the tokens of a random window are; None after TRIES windows that were refused.

        Of several affixes in a window the one that is kept most decides. The border and what is no text are in none.
        """
        tokens, after, refusal = document.tokens, document.after, self._refusal
        for _ in range(TRIES):
            at = 1 + int(uniform() * (len(tokens) - 1))
            places, refused = [at], refusal[tokens[at]]
            while len(places) < size:
                at = after[at]
                places.append(at)
                if refusal[tokens[at]] > refused:
                    refused = refusal[tokens[at]]
            if not refused or uniform() >= refused:
                return places
            self.counts["windows refused"] += refused < 1
        return None

    def _affix_tokens(self) -> dict[int, float]:
        """The tokens that are an affix, and how often a window with one is refused."""
        bare = {text.strip().lower() for text in self._affixes}
        kept = {}
        for text in self._affixes:
            token = self._vocabulary.id_of(text)
            if token is not None:
                affix = text.strip().lower()
                longer = any(other != affix and other.startswith(affix) for other in bare)
                kept[token] = KEEP_AFFIX_BEGINNING if longer else KEEP_AFFIX
        return kept

    def _find_affixes(self, text: str) -> tuple[tuple[int, int, str], ...]:
        """(start, end, affix) of each one in a text; of those with a space only, if there are any."""
        found = []
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                part = text[start:end]
                if part not in self._beginnings:
                    break
                if part in self._affixes:
                    found.append((start, end, self._affixes[part]))
        beside_space = [match for match in found if " " in text[match[0] : match[1]]]
        return tuple(beside_space or found)

    def _encode_piece(self, piece: str) -> "Piece | None":
        """Of a piece cut around its first doubled syllable, each part encoded by itself; None where one cannot be."""
        doubled = DOUBLED.search(piece)
        cuts = [0, *doubled.span(), len(piece)] if doubled else [0, len(piece)]
        parts = [self._vocabulary.encode(piece[a:b]) for a, b in pairwise(cuts) if a < b]
        if any(ids is None for ids in parts):
            return None
        return Piece(tuple(token for ids in parts if ids for token in ids), doubled is not None)


class Piece(NamedTuple):
    """A piece of a window, encoded."""

    ids: tuple[int, ...]
    doubled: bool


class Sequence:
    """Tokens in a ring whose border is at 0: one is drawn and a few are replaced in a time that no length changes.

    tokens, before, after: the tokens in any order, from 1 to their number without a gap, and their neighbours
    """

    def __init__(self, ids: list[int]):
        self.tokens = [-1, *ids]
        self.after = [*range(1, len(ids) + 1), 0]
        self.before = [len(ids), *range(len(ids))]

    def replace(self, places: list[int], ids: list[int]) -> None:
        """Other tokens, at least one, for the tokens at `places`, which follow each other."""
        tokens, before, after, end = self.tokens, self.before, self.after, self.after[places[-1]]
        for place, token in zip(places, ids, strict=False):
            tokens[place] = token
        at = places[min(len(places), len(ids)) - 1]
        for token in ids[len(places) :]:
            after[at] = len(tokens)
            before.append(at)
            at = len(tokens)
            tokens.append(token)
            after.append(end)
        after[at], before[end] = end, at
        for place in sorted(places[len(ids) :], reverse=True):
            self._free(place)

    def _free(self, place: int) -> None:
        """A place that nothing points to any more takes what is at the last one, which goes."""
        token, before, after = self.tokens.pop(), self.before.pop(), self.after.pop()
        if place < len(self.tokens):
            self.tokens[place], self.before[place], self.after[place] = token, before, after
            self.after[before] = self.before[after] = place

    def in_order(self) -> list[int]:
        found, at = [], self.after[0]
        while at:
            found.append(self.tokens[at])
            at = self.after[at]
        return found


def _numbers(rng: np.random.Generator) -> Iterator[float]:
    """Random numbers in [0, 1), drawn many at a time: one at a time would take longer than all else."""
    while True:
        yield from rng.random(256).tolist()
