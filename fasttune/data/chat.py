"""Conversations → text with its learned spans, from the structure of the conversation: the chat template is rendered
up to each answer and past it, and what lies between is learned. No marker is ever searched for.

Imports neither torch nor the tokenizer classes of transformers, so that workers start quickly.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fasttune.data.formats import Conversation, Message, Unusable
from fasttune.errors import DataError

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

    def render(self, messages: list[Message], tools: list[Any] | None = None, ask: bool = False) -> str:
        """The text of the turns; `ask`: ready for the assistant to answer. Raises Unusable if the template refuses."""
        import jinja2

        try:
            template = _compiled(self.source)
            given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
            # As template.render() does, but with one flat dict: its chain of them is a third of the time of a row.
            context = template.new_context({**template.globals, **self.special, **given}, shared=True)
            return "".join(template.root_render_func(context))
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise Unusable(f"refused by the chat template ({error})") from error

    def text(self, conversation: Conversation | str, train_on: str, place: str) -> tuple[str, list[Span]]:
        """Text and learned spans of a row. `train_on`: assistant (every answer), last, or all.

        Raises DataError when the template does not render prefixes consistently (a later turn changes earlier text),
        since then no label could be trusted; Unusable when there is no answer to learn.
        """
        if isinstance(conversation, str):
            text = self.bos + conversation + self.eos
            return text, [(0, len(text))]
        messages, tools = conversation.messages, conversation.tools
        whole = self.render(messages, tools)
        if train_on == "all" and self.closing != "":
            return whole, [(0, len(whole))]
        answers = conversation.answers[-1:] if train_on == "last" else conversation.answers
        spans, gaps = [], []
        for index in answers:
            start, end = self._answer(whole, messages, index, tools, place)
            content = messages[index]["content"]
            if content.strip() and content.split()[-1] not in whole[start:end]:
                raise Unusable("the chat template leaves out the answer")  # e.g. one made for pictures
            closed, end = _end_of_turn(whole[start:end], content, start)
            spans.append((start, end))
            gaps += [] if closed else [end]
        text, spans = _insert(whole, spans, gaps, self.eos)
        return text, [(0, len(text))] if train_on == "all" else spans

    def _answer(self, whole: str, messages: list[Message], index: int, tools: Any, place: str) -> Span:
        before = self.render(messages[:index], tools, ask=True)
        after = whole if index == len(messages) - 1 else self.render(messages[: index + 1], tools)
        if not whole.startswith(after) and self.eos:
            after = after.removesuffix(self.eos)  # some templates (Phi 3) close every rendering with EOS
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            remedy = "" if index == len(messages) - 1 else "learn only the last answer (data.train_on=last), or "
            raise DataError(
                f"data: {place}: the chat template does not render prefixes consistently (around turn {index + 1}), so "
                f"labels cannot be placed: {remedy}use another template"
            )
        return len(before), len(after)


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
    try:
        text = template.render(PROBE)
    except Unusable:
        return changes  # its rows will be refused one by one, plain texts are none of its business
    if template.bos and not text.startswith(template.bos):
        tokenizer.chat_template = BOS_FIRST + tokenizer.chat_template
        changes.append(("BOS put in front", "the tokenizer adds it to every text, the template does not"))
    if template.eos and template.closing == "":
        changes.append(("EOS put after each answer", "the template never closes one, so the end would not be learned"))
    return changes


def template_of(tokenizer: Any) -> Template:
    """The Template of a transformers tokenizer."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("x").input_ids[:1] == [bos]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return Template(tokenizer.get_chat_template(), special, adds_bos)


@lru_cache
def _compiled(source: str) -> Any:
    """A template as transformers compiles it; tests compare the two. Importing that here costs every worker seconds."""
    import json
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks answers in some templates: nothing but what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


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
