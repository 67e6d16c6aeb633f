"""Control tokens in a row's own texts, read as plain text (data.control_tokens=text); not those of the template.

A MARK in each of them travels through the template; each piece of the text between them is then encoded by itself.
"""

import re
from bisect import bisect_left
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fasttune.data.chat import Span
from fasttune.data.formats import REASONING, Conversation, Unusable
from fasttune.data.tokenize import token_spans

MARK = "\ue000"  # of Unicode's private use


def marked(row: Conversation | str, control: re.Pattern[str]) -> Conversation | str:
    """The row with a MARK in each of them. Raises Unusable for one that has the mark already."""
    if isinstance(row, str):
        return _marked(row, control)
    said = ("content", *REASONING)
    messages = [
        {key: _marked(part, control) if key in said and isinstance(part, str) else part for key, part in turn.items()}
        for turn in row.messages
    ]
    return replace(row, messages=messages)


def _marked(text: str, control: re.Pattern[str]) -> str:
    if MARK in text:
        raise Unusable("control tokens beside U+E000, which would mark them")
    return control.sub(lambda found: found[0][0] + MARK + found[0][1:], text)


def unmarked(text: str, spans: list[Span], control: re.Pattern[str]) -> tuple[str, list[Span], list[Span]]:
    """(text, spans, where the control tokens of the row are) without the marks. Raises Unusable."""
    if "\\ue000" in text:
        raise Unusable("control tokens that the chat template writes as JSON escapes")
    marks = [at for at, character in enumerate(text) if character == MARK]
    text = text.replace(MARK, "")

    def before(at: int) -> int:
        return at - bisect_left(marks, at)

    found = [control.match(text, before(mark) - 1) for mark in marks]
    return text, [(before(a), before(b)) for a, b in spans], [match.span() for match in found if match]


def encode(tokenizer: Any, text: str, spans: list[Span], apart: list[Span]) -> tuple[list[int], list[Span]]:
    """Ids and supervised tokens of a text of which some places hold no control tokens, whatever they say."""
    edges = [0, *(at for span in apart for at in span), len(text)]
    ids: list[int] = []
    found: list[Span] = []
    for number, (start, end) in enumerate(pairwise(edges)):
        tokenizer.encode_special_tokens = number % 2 == 1
        encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
        inside = [(max(a, start) - start, min(b, end) - start) for a, b in spans if a < end and b > start]
        found += [(len(ids) + a, len(ids) + b) for a, b in token_spans(encoding, end - start, inside)]
        ids += encoding.ids
    tokenizer.encode_special_tokens = False
    return ids, found
