"""Conversations → text with its learned spans, from the structure of the conversation: the chat template is rendered
up to each answer and past it, and what lies between is learned. No marker is ever searched for.

Imports neither torch nor the tokenizer classes of transformers, so that workers start quickly.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fasttune.data import calls, lost, sandbox
from fasttune.data.formats import Conversation, Message, Refused, Unusable
from fasttune.data.lost import Shown
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
USED = ("default", "tool_use")  # of several named templates
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
        """Text and learned spans of a row. `train_on`: assistant (every answer), last, or all.

        `notes` counts what the template left out: what is learned only if `allow_lost` has its name (lost.WORDS).
        Raises DataError for other losses and when the template does not render prefixes consistently (a later turn
        changes earlier text), since then no label could be trusted; Unusable when there is no answer to learn.
        """
        if isinstance(conversation, str):
            text = self.bos + conversation + self.eos
            return text, [(0, len(text))]
        with sandbox.bounded():
            messages, whole = self._fitting(conversation.messages, conversation.tools)
            answers = conversation.answers[-1:] if train_on == "last" else conversation.answers
            spans, gaps = [], []
            for index in answers if train_on != "all" or self.closing == "" else []:
                start, end = self._answer(whole, messages, index, conversation.tools, place)
                closed, end = _end_of_turn(whole[start:end], messages[index]["content"], start)
                spans.append((start, end))
                gaps += [] if closed else [end]
        everything = dict.fromkeys(range(len(messages)), (0, len(whole)))
        learned = everything if train_on == "all" else dict(zip(answers, spans, strict=True))
        names = self._check(whole, messages, conversation.tools, learned, place, allow_lost)
        if notes is not None:
            notes.update(names)
        text, spans = _insert(whole, spans, gaps, self.eos)
        return text, [(0, len(text))] if train_on == "all" else spans

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
        """The turns in the first of calls.ways that loses nothing (else the first that renders), and their text."""
        if all(len(turn) == 2 for turn in messages):
            return messages, self._render(messages, tools, ask)
        found: list[tuple[int, list[Message], str]] = []
        refused = None
        for way in calls.ways(messages):
            try:
                whole = self._render(way, tools, ask)
            except Unusable as error:
                refused = error
                continue
            shown = Shown(whole)
            last = next((turn for turn in reversed(way) if any(key in turn for key in calls.REASONING)), None)
            parts = [lost.of_turn(turn, shown) - ({"reasoning"} if turn is not last else set()) for turn in way]
            flaws = 2 * any(parts) + calls.spoiled(way, whole)
            found.append((flaws, way, whole))
            if not flaws:
                break
        if not found:
            assert refused is not None
            raise refused
        return min(found, key=lambda each: each[0])[1:]

    def _check(
        self,
        whole: str,
        messages: list[Message],
        tools: Any,
        learned: dict[int, Span],
        place: str,
        allow_lost: Collection[str],
    ) -> set[str]:
        """What is not in the text of what the turns have, that of a learned turn in its span. Raises DataError."""
        all_of_it, names = Shown(whole), set[str]()
        for index, turn in enumerate(messages):
            span = learned.get(index)
            part = whole[span[0] : span[1]] if span else whole
            if len(turn) == 2 and turn["content"] in part:
                continue  # most turns
            asked = any(later["role"] == "user" for later in messages[index:])
            for kind in lost.of_turn(turn, Shown(part) if span else all_of_it):
                dropped_by_design = kind == "reasoning" and asked and len(part) == len(whole)
                if kind not in allow_lost and (kind == "tool_turns" or (span and not dropped_by_design)):
                    raise _leaves_out(kind, place, f" (turn {index + 1})")
                names.add(kind if span or kind == "tool_turns" else f"{kind} of a turn that is only read")
            if len(turn) > 2:
                names |= {f"{key}, a key of a turn" for key in lost.unread(turn, self.source_for(tools))}
        missing = lost.of_tools(tools or [], all_of_it)
        if "tools" in missing - set(allow_lost):
            raise _leaves_out("tools", place, "")
        return {f"lost: {name}" for name in names | missing}

    def _answer(self, whole: str, messages: list[Message], index: int, tools: Any, place: str) -> Span:
        before = self._render(messages[:index], tools, ask=True)
        after = whole if index == len(messages) - 1 else self._render(messages[: index + 1], tools)
        if not whole.startswith(after) and self.eos:
            after = after.removesuffix(self.eos)  # some templates (Phi 3) close every rendering with EOS
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            remedy = "" if index == len(messages) - 1 else "learn only the last answer (data.train_on=last), or "
            raise DataError(
                f"data: {place}: the chat template does not render prefixes consistently (around turn {index + 1}), so "
                f"labels cannot be placed: {remedy}use another template"
            )
        return len(before), len(after)


def _leaves_out(kind: str, place: str, where: str) -> DataError:
    return DataError(
        f"data: {place}: the chat template leaves out {lost.WORDS[kind]}{where}: use a model whose template has a "
        f"place for it, or train without: data.allow_lost=[{kind}]"
    )


def complete(tokenizer: Any) -> list[tuple[str, str]]:
    """Make the tokenizer's template fit to train with, in place, so that it is saved with the model as it was used.

    A missing template becomes the plain one; BOS is put in front where the tokenizer itself would add it and the
    template does not. Returns (what, why) of each change.
    """
    changes = []
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        changes.append(("plain headings", "the tokenizer brings none"))
    template = template_of(tokenizer)
    several = isinstance(tokenizer.chat_template, dict)
    named = tokenizer.chat_template if several else {"default": tokenizer.chat_template}
    if several:
        also = ", tool_use for rows with tools" if template.tool_use else ""
        changes.append((f"default{also}", f"the tokenizer brings {', '.join(named)}"))
    fit = named | {name: _with_bos(replace(template, source=named[name])) for name in USED if name in named}
    if fit != named:
        tokenizer.chat_template = fit if several else fit["default"]
        changes.append(("BOS put in front", "the tokenizer adds it to every text, the template does not"))
    if template.eos and template.closing == "":
        changes.append(("EOS put after each answer", "the template never closes one, so the end would not be learned"))
    return changes


def _with_bos(template: Template) -> str:
    """The source, with BOS in front where the tokenizer itself would add it and the template does not."""
    try:
        text = template.render(PROBE)
    except Unusable:
        return template.source  # its rows will be refused one by one, plain texts are none of its business
    return BOS_FIRST + template.source if template.bos and not text.startswith(template.bos) else template.source


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
            "default: write the one to use to chat_template.jinja in a copy of the model's folder"
        )
    return Template(source["default"], special, adds_bos, source.get("tool_use"))


def _end_of_turn(answer: str, content: str | None, start: int) -> tuple[bool, int]:
    """Where learning ends: with the end-of-turn token, not with the line break that usually follows it.

    False when nothing but blanks follows the content: the template does not close the turn.
    """
    stripped = answer.rstrip()
    content = (content or "").strip()  # as much of it as a template that trims leaves
    closed = not (content and stripped.endswith(content))
    return closed, start + (len(stripped) if closed else stripped.rindex(content) + len(content))


def _insert(text: str, spans: list[Span], gaps: list[int], eos: str) -> tuple[str, list[Span]]:
    """`eos` into `text` at every gap, which is the end of a span and is learned with it."""
    for gap in reversed(gaps):
        text = text[:gap] + eos + text[gap:]
        spans = [(s + len(eos) * (s >= gap), e + len(eos) * (e >= gap)) for s, e in spans]
    return text, spans
