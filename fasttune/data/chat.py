"""Conversations → text with its supervised spans, from the structure of the conversation: the chat template is rendered
up to each answer and past it, and what lies between is supervised. No marker is ever searched for.

Imports neither torch nor the tokenizer classes of transformers, so that workers start quickly.
"""

import re
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fasttune.data import sandbox
from fasttune.data.formats import Conversation, Message, Refused, Unusable
from fasttune.errors import DataError, ModelError

# For base models that come without a template: role headings, the answer closed by EOS.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
BOS_FIRST = "{{ bos_token }}"
PROBE_ANSWER = "Certainly, 1.2.3"
PROBE = [{"role": "user", "content": "Hello, 4.5.6"}, {"role": "assistant", "content": PROBE_ANSWER}]

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with its special tokens by name (bos_token, eos_token, …)."""

    source: str
    special: dict[str, Any]
    adds_bos: bool  # the tokenizer puts BOS before a plain text
    tool_use: str | None = None  # another source, for rows with tools

    @cached_property
    def closing(self) -> str | None:
        """What is written after an answer, from which its end is learned; None where even that is refused."""
        try:
            return self.render(PROBE).rpartition(PROBE_ANSWER)[2].strip()
        except Unusable:
            return None  # its rows will be refused one by one

    @property
    def eos(self) -> str:
        return self.special.get("eos_token") or ""

    @property
    def bos(self) -> str:
        return (self.special.get("bos_token") or "") if self.adds_bos else ""

    def source_for(self, tools: Any) -> str:
        """Of several templates transformers takes `tool_use` where there are tools, else `default`."""
        return self.tool_use if tools and self.tool_use else self.source

    def render(self, messages: list[Message], tools: list[Any] | None = None, ask: bool = False) -> str:
        """The text of the turns; `ask`: ready for the assistant to answer. Raises Unusable if the template refuses,
        ModelError if it takes more time or memory than a template may.
        """
        with sandbox.bounded():
            return self._render(messages, tools, ask)

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text up to where the assistant answers, as training has it before that answer. Raises as `render`."""
        with sandbox.bounded():
            return self._fitting(messages, tools, ask=True)[1]

    def text(
        self,
        conversation: Conversation | str,
        train_on: str,
        place: str,
        allow_lost: Collection[str] = (),
        notes: Counter[str] | None = None,
    ) -> tuple[str, list[Span]]:
        """Text and supervised spans of a row. `train_on`: assistant (every answer), last, or all.

        `notes` counts what the template left out. Raises DataError where that may not be (only if `allow_lost` has its
        name, of settings.LOSSES), and where a later turn changes earlier text, since then no label could be trusted;
        Unusable where the template refuses the row.
        """
        if isinstance(conversation, str):
            text = self.bos + conversation + self.eos
            return text, [(0, len(text))]
        tools = conversation.tools
        answers = conversation.answers[-1:] if train_on == "last" else conversation.answers
        spans, gaps = list[Span](), list[int]()
        with sandbox.bounded():
            messages, whole = self._fitting(conversation.messages, tools)
            for index in answers if train_on != "all" or self.closing == "" else []:
                start, end = self._answer(whole, messages, index, tools, place)
                closed, end = _end_of_turn(whole[start:end], messages[index]["content"], start)
                spans.append((start, end))
                gaps += [] if closed else [end]
        everything = dict.fromkeys(range(len(messages)), (0, len(whole)))
        supervised = everything if train_on == "all" else dict(zip(answers, spans, strict=True))
        if tools or not _all_plainly_there(whole, messages, supervised):
            from fasttune.data import losses

            lost = losses.check(whole, messages, tools, self.source_for(tools), supervised, place, allow_lost)
            if notes is not None:
                notes.update(f"lost: {name}" for name in lost)
        for gap in reversed(gaps):  # the end of a span, which EOS is supervised with
            whole = whole[:gap] + self.eos + whole[gap:]
            spans = [(a + len(self.eos) * (a >= gap), b + len(self.eos) * (b >= gap)) for a, b in spans]
        return whole, [(0, len(whole))] if train_on == "all" else spans

    def _render(self, messages: list[Message], tools: list[Any] | None, ask: bool = False) -> str:
        try:
            template = sandbox.compiled(self.source_for(tools))
            given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
            # As template.render() does, but with one flat dict: its chain of them is a third of the time of a row.
            context = template.new_context({**template.globals, **self.special, **given}, shared=True)
            return "".join(template.root_render_func(context))
        except MemoryError:
            raise
        except Exception as error:  # whatever a program of others raises
            said = " ".join(str(error).split()) or type(error).__name__
            raise Refused(f"refused by the chat template ({said[:120]})") from error

    def _fitting(self, messages: list[Message], tools: Any, ask: bool = False) -> tuple[list[Message], str]:
        """The turns as the template wants them, and their text."""
        if all(len(turn) == 2 for turn in messages):
            return messages, self._render(messages, tools, ask)
        from fasttune.data import losses

        return losses.fitting(messages, lambda way: self._render(way, tools, ask))

    def _answer(self, whole: str, messages: list[Message], index: int, tools: Any, place: str) -> Span:
        before = self._render(messages[:index], tools, ask=True)
        after = whole if index == len(messages) - 1 else self._render(messages[: index + 1], tools)
        if not whole.startswith(after) and self.eos:
            after = after.removesuffix(self.eos)  # some templates (Phi 3) close every rendering with EOS
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            remedy = "" if index == len(messages) - 1 else "train on the last answer only (data.train_on=last), or "
            raise DataError(
                f"data: {place}: the chat template does not render prefixes consistently (around turn {index + 1}), so "
                f"labels cannot be placed: {remedy}set another template (data.chat_template)"
            )
        return len(before), len(after)


def complete(tokenizer: Any, given: str | None = None) -> list[tuple[str, str]]:
    """Make the tokenizer's template fit to train with, in place, so that it is saved with the model as it was used.

    `given`: data.chat_template, in place of the tokenizer's own. A missing one becomes the plain one; BOS is put in
    front where the tokenizer itself would add it and the template does not. Returns (what, why) of each change.
    """
    changes = list[tuple[str, str]]()
    if given is not None:
        from fasttune.data import chat_templates

        changes += chat_templates.put(tokenizer, given)
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        changes.append(("plain headings", "the tokenizer brings none"))
    template = template_of(tokenizer)
    several = isinstance(tokenizer.chat_template, dict)
    named = tokenizer.chat_template if several else {"default": tokenizer.chat_template}
    if several:
        also = ", tool_use for rows with tools" if template.tool_use else ""
        changes.append((f"default{also}", f"the tokenizer brings {', '.join(named)}"))
    fit = dict(named)
    for name in named.keys() & {"default", "tool_use"}:
        with suppress(Unusable):  # its rows will be refused one by one, plain texts are none of its business
            if not replace(template, source=named[name]).render(PROBE).startswith(template.bos):
                fit[name] = BOS_FIRST + named[name]
    if fit != named:
        tokenizer.chat_template = fit if several else fit["default"]
        changes.append(("BOS put in front", "the tokenizer adds it to every text, the template does not"))
    if template.eos and template.closing == "":
        changes.append(("EOS put after each answer", "the template closes none, so the model would not learn to end"))
    return changes


def template_of(tokenizer: Any) -> Template:
    """The Template of a transformers tokenizer. Raises ModelError where it brings several and none called default."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("x").input_ids[:1] == [bos]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    source = tokenizer.chat_template
    if not isinstance(source, dict):
        return Template(source, special, adds_bos)
    if "default" not in source:
        raise ModelError(
            f"model.name: its tokenizer brings the chat templates {', '.join(map(str, source))[:120]}, none called "
            "default: to train, set data.chat_template; else write one to chat_template.jinja in a copy of the folder"
        )
    return Template(source["default"], special, adds_bos, source.get("tool_use"))


def _all_plainly_there(whole: str, turns: list[Message], supervised: dict[int, Span]) -> bool:
    """Whether every turn says one text and nothing else, which stands in its span (else anywhere) as it is."""
    spans = (supervised.get(index, (0, len(whole))) for index in range(len(turns)))
    return all(len(turn) == 2 and turn["content"] in whole[a:b] for turn, (a, b) in zip(turns, spans, strict=True))


def _end_of_turn(answer: str, content: str | None, start: int) -> tuple[bool, int]:
    """Where supervision ends: with the end-of-turn token, not with the line break that usually follows it.

    False when nothing but blanks follows the content: the template does not close the turn.
    """
    stripped = answer.rstrip()
    content = (content or "").strip()  # as much of it as a template that trims leaves
    closed = not (content and stripped.endswith(content))
    return closed, start + (len(stripped) if closed else stripped.rindex(content) + len(content))


class ControlTokens:
    """Control tokens (`<|im_end|>`) that stand in a row's own texts.

    Only the special ones of a plain `tokenizers` tokenizer: others, as <think>, are meant to be written in texts.
    """

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
            for beginning in self.beginnings if isinstance(text, str) else ():
                if beginning in text:
                    found.update(self.pattern.findall(text))
                    break
        return found
