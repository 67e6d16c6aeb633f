"""Control tokens (`<|im_end|>`) that stand in a row's own texts: found, and kept apart from those of the template."""

import re
from typing import Any

from fasttune.data.calls import REASONING
from fasttune.data.formats import Conversation, Unusable

Span = tuple[int, int]
MARK = "\ue000"  # of Unicode's private use; put into a control token, it travels through the template


class ControlTokens:
    """The special ones of a plain `tokenizers` tokenizer: others, as <think>, are meant to be written in texts."""

    def __init__(self, tokenizer: Any):
        known = tokenizer.get_added_tokens_decoder().values()
        names = sorted((token.content for token in known if token.special and len(token.content) > 1), key=len)
        self.pattern = re.compile("|".join(map(re.escape, reversed(names))))
        self.beginnings = {name[0] for name in names}  # looked for first: most texts have none of them

    def in_row(self, row: Conversation | str) -> set[str]:
        """The control tokens in what its turns say."""
        texts = [row] if isinstance(row, str) else [text for turn in row.messages for text in turn.values()]
        found = set[str]()
        for text in texts:
            if isinstance(text, str):
                for beginning in self.beginnings:
                    if beginning in text:
                        found.update(self.pattern.findall(text))
                        break
        return found

    def marked(self, row: Conversation | str) -> Conversation | str:
        """The row with a MARK in each of them. Raises Unusable for one that has the mark already."""
        if isinstance(row, str):
            return self._marked(row)
        said = ("content", *REASONING)
        messages = [
            {key: self._marked(part) if key in said and isinstance(part, str) else part for key, part in turn.items()}
            for turn in row.messages
        ]
        return Conversation(messages, row.answers, row.tools)

    def _marked(self, text: str) -> str:
        if MARK in text:
            raise Unusable("control tokens beside U+E000, which would mark them")
        return self.pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)

    def unmarked(self, text: str, spans: list[Span]) -> tuple[str, list[Span], list[Span]]:
        """(text, spans, where the control tokens of the row are) without the marks. Raises Unusable."""
        if "\\ue000" in text:
            raise Unusable("control tokens that the chat template writes as JSON escapes")
        marks = [at for at, character in enumerate(text) if character == MARK]
        text = text.replace(MARK, "")

        def before(at: int) -> int:
            return at - sum(mark < at for mark in marks)

        found = [self.pattern.match(text, before(mark) - 1) for mark in marks]
        return text, [(before(a), before(b)) for a, b in spans], [match.span() for match in found if match]
