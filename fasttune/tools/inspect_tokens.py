"""How `data.tokenization` splits tokens, for `fasttune data`: figures, and words as they were and are now."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from fasttune import terminal
from fasttune.data.vocabulary import Vocabulary

KIND = "tokenization: "  # of counts
WORDS, AFFIXES = 12, 12  # shown
TOLD = (  # what `subword.Splitter` counts, as a person reads it, in the order of its work
    ("windows", "windows of 2 to 4 tokens, joined and cut again"),
    ("doubled syllables", "doubled syllables set apart"),
    ("no window", "windows not found: an affix in each that was tried"),
    ("windows that cut a character", "windows left alone: they would cut a character"),
    ("windows encoded otherwise", "windows left alone: the tokenizer changes their text"),
    ("splits", "tokens split in two"),
    ("wasted attempts", "tokens left whole: an affix, or no two tokens make it"),
)


@dataclass(frozen=True)
class Tokenization:
    """Over all documents. found: what the splitter counted. words: (as the tokenizer cuts it, as it is trained on)."""

    mode: str
    tokens_before: int
    tokens_after: int
    found: dict[str, int]
    affixes: dict[str, int]  # affix → how often it was cut out, the most frequent first
    words: list[tuple[list[str], list[str]]]


def look(mode: str, counts: Sequence[Counter[str]], tokenizer: Any, documents: Iterator[np.ndarray]) -> Tokenization:
    """The figures of all parts. `documents`: ids as they are trained on, of which the first changed words are shown."""
    total = sum(
        (Counter({n.removeprefix(KIND): c[n] for n in c if n.startswith(KIND)}) for c in counts), Counter[str]()
    )
    affixes = {name.removeprefix("affix: "): n for name, n in total.most_common() if name.startswith("affix: ")}
    found = {name: n for name, n in sorted(total.items()) if not name.startswith(("affix: ", "tokens "))}
    plain = tokenizer.backend_tokenizer
    return Tokenization(
        mode=mode,
        tokens_before=total["tokens before"],
        tokens_after=total["tokens after"],
        found=found,
        affixes=affixes,
        words=_words(plain, Vocabulary(plain), documents),
    )


def _words(plain: Any, vocabulary: Vocabulary, documents: Iterator[np.ndarray]) -> list[tuple[list[str], list[str]]]:
    shown: dict[bytes, tuple[list[str], list[str]]] = {}
    for ids in documents:
        after = [vocabulary.token_bytes[token] for token in ids.tolist() if vocabulary.ordinary[token]]
        text = b"".join(after).decode(errors="replace")
        before = [vocabulary.token_bytes[token] for token in plain.encode(text, add_special_tokens=False).ids]
        if b"".join(before) != b"".join(after):  # a tokenizer that changes the text, or puts a space in front
            continue
        trained = _cuts(after)
        for word, cuts in _cuts(before).items():
            changed = trained.get(word)
            if changed is not None and changed != cuts and word not in shown:
                shown[word] = _spelled(cuts), _spelled(changed)
            if len(shown) == WORDS:
                return list(shown.values())
    return list(shown.values())


def _cuts(tokens: list[bytes]) -> dict[bytes, list[bytes]]:
    """Word → the pieces it is cut into, the first time that it stands there."""
    words: dict[bytes, list[bytes]] = {}
    pieces: list[bytes] = []
    for token in [*tokens, b" "]:
        for at, part in enumerate(token.replace(b"\n", b" ").split(b" ")):
            if at:
                words.setdefault(b"".join(pieces), pieces)
                pieces = []
            if part:
                pieces.append(part)
    return words


def _spelled(pieces: list[bytes]) -> list[str]:
    return [piece.decode(errors="backslashreplace") for piece in pieces]


def lines(figures: Tokenization, visible: Any) -> list[RenderableType]:
    """The paragraph of the page; `visible` makes text of the data safe for a terminal."""
    before, after = figures.tokens_before, figures.tokens_after
    told = f"  {before:,} tokens became {after:,} ({after / before:.3f} ×)" if before else "  no token"
    made: list[RenderableType] = [Text.assemble((f"data.tokenization={figures.mode}", "bold"), told)]
    made += [Text(f"{figures.found[name]:,} {what}", style="dim") for name, what in TOLD if figures.found.get(name)]
    if figures.affixes:
        most = [f"{visible(affix)} {n:,}" for affix, n in list(figures.affixes.items())[:AFFIXES]]
        more = f" and {len(figures.affixes) - AFFIXES:,} more" if len(figures.affixes) > AFFIXES else ""
        made.append(Text(f"affixes cut at: {', '.join(most)}{more}", style="dim"))
    rows = [
        ("·".join(old), Text("→ " + visible("·".join(new)), style="bold green"), None) for old, new in figures.words
    ]
    if rows:
        made += [Text("words as the tokenizer cuts them → as they are trained on"), terminal.grid(rows)]
    return made
