"""What chat templates do wrong: what they leave out is an error or counted, and none of them runs without end."""

import importlib.util
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fasttune.data import chat, formats, sandbox
from fasttune.data.formats import Conversation, Unusable
from fasttune.errors import DataError, ModelError
from fasttune.settings import LOSSES
from tests.test_chat import MESSAGES, TOOL, TWO_ANSWERS, parts, plain


def every_template() -> dict[str, str]:
    """Those that trl and Unsloth bring, by name."""
    package = importlib.util.find_spec("trl")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "chat_templates"
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    from unsloth import chat_templates

    texts = {name: value for name, value in vars(chat_templates).items() if isinstance(value, str) and "{%" in value}
    return found | texts


ASKED = {"role": "user", "content": "Is it wet?"}


HARD = '{"town": "Pörto \\"x\\"\\nC:\\\\new", "n": 1.50, "b": true, "z": null, "l": [1, {"k": "v v"}]}'


def calling(arguments: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "call12345", "function": {"name": "look_out", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SEEN = {"role": "tool", "name": "look_out", "tool_call_id": "call12345", "content": '{"seen": "rain \\n fog"}'}


# What of each is trained on, by kind: some words of it that stand nowhere else.
SHAPES: dict[str, tuple[list[dict[str, Any]], list[Any] | None, dict[str, str]]] = {
    "odd text": ([ASKED, said('  "Very" \\n C:\\new\n\n\twet <b> é 😀 ')], None, {"content": "wet <b> é 😀"}),
    "calls": (
        [ASKED, calling(HARD), SEEN, said("It is.")],
        [TOOL],
        {"tool_calls": "v v", "tools": "look_out", "tool_turns": "fog", "descriptions of tools": "dry"},
    ),
    "call beside a text": (
        [ASKED, calling({"town": "Porto"}, "I shall see."), SEEN, said("It is.")],
        [TOOL],
        {"content": "I shall see.", "tool_calls": "Porto", "tool_turns": "fog"},
    ),
    "reasoning": ([ASKED, said("Yes.", thinking="Because\nof fog")], None, {"reasoning": "of fog"}),
    "inline": ([ASKED, said("<think>\nBecause of fog\n</think>\n\nYes.")], None, {"reasoning": "of fog"}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_said_to_be_lost_is_lost_and_nothing_else(unsloth: None, shape: str) -> None:
    """Over every template there is: a loss is reported exactly where the words are not in the text."""
    turns, tools, words = SHAPES[shape]
    row = formats.convert({"messages": turns, "tools": tools}, "messages", "row 1")
    rendered = kept = 0
    for name, template in every_template().items():
        notes: Counter[str] = Counter()
        try:
            text, _ = plain(template, "</s>", "<s>").text(row, "all", "row 1", LOSSES, notes)
        except (Unusable, DataError):
            continue
        rendered += 1
        for kind, word in words.items():
            assert (f"lost: {kind}" in notes) == (word not in text), (name, kind, notes, text)
        kept += not notes
    assert rendered > 60
    assert kept > 25


OWN = '[look_out] {"n":  1.50};<end>'


SAYS = "{{ '<a>' + (m.content or '') }}"


CALLS = "{% for t in m.tool_calls %}[{{ t.function.name }}] {{ t.function.arguments ARGUMENTS }};{% endfor %}"


def turns_of(answer: str) -> str:
    """A template of `user` and tool turns, and of answers as given."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "<end>{% else %}<u>{{ m.content }}{% endif %}"
        "{% endfor %}{{ '<a>' if add_generation_prompt }}"
    )


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("<a>" + CALLS.replace("ARGUMENTS", "| tojson"), '[look_out] {"n": 1.5};<end>'),
        ("<a>" + CALLS.replace("{{ t.function.arguments ARGUMENTS }}", "{{ '' + t.function.arguments }}"), OWN),
        ("<a>" + CALLS.replace("ARGUMENTS", ""), OWN),  # an object would be written as Python writes it
        ("<a>{{ m.content }}" + CALLS.replace("ARGUMENTS", "| tojson"), '[look_out] {"n": 1.5};<end>'),  # not None
        ("{% if m.content is none %}<a>" + CALLS.replace("ARGUMENTS", "") + "{% else %}" + SAYS + "{% endif %}", OWN),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_a_call_is_put_as_the_template_wants_it(answer: str, learned: str, content: str | None) -> None:
    """The object of the arguments, else the row's own text; no content as null or as nothing."""
    row = formats.convert({"messages": [ASKED, calling('{"n":  1.50}', content), SEEN]}, "messages", "row 1")
    assert isinstance(row, Conversation)
    template = plain(turns_of(answer))
    text, spans = template.text(row, "assistant", "row 1")
    assert parts(text, spans) == [learned]
    assert template.prompt(row.messages) == text + "<a>"  # what is asked after it has the same form


def test_reasoning_has_the_name_that_the_template_reads() -> None:
    template = plain(turns_of("<a>{{ m.thinking or '' }}|{{ m.content }}"))
    row = formats.convert({"messages": [ASKED, said("Yes.", reasoning_content="fog")]}, "messages", "row 1")
    text, spans = template.text(row, "assistant", "row 1")
    assert parts(text, spans) == ["fog|Yes.<end>"]


@pytest.mark.parametrize(
    ("turns", "tools", "kind", "told"),
    [
        ([calling({"town": "Porto"})], None, "tool_calls", r"its tool calls \(turn 2\)"),
        ([calling({"town": "Porto"}, "I look.")], None, "tool_calls", r"its tool calls \(turn 2\)"),
        ([said("Yes.", reasoning_content="fog")], None, "reasoning", r"its reasoning \(turn 2\)"),
        ([said("Yes.")], [TOOL], "tools", "the tools"),
        ([said("Silence")], None, "content", r"what a turn says \(turn 2\)"),
        ([said("Hm."), SEEN, said("Yes.")], None, "tool_turns", r"what a tool answered \(turn 3\)"),
    ],
)
def test_what_is_lost_is_an_error_unless_it_is_allowed(
    turns: list[dict[str, Any]], tools: list[Any] | None, kind: str, told: str
) -> None:
    """By a template that knows nothing but what turns say, says no silence, and no tools."""
    source = turns_of("{{ '<a>' ~ (m.content or '') | replace('Silence', '') }}")
    template = plain(source.replace("<u>{{ m.content }}", "<u>{{ m.content if m.role == 'user' }}"))
    row = formats.convert({"messages": [ASKED, *turns], "tools": tools}, "messages", "row 1")
    with pytest.raises(DataError, match=rf"^data: row 1: the chat template leaves out {told}.*allow_lost=\[{kind}\]'$"):
        template.text(row, "assistant", "row 1")
    notes: Counter[str] = Counter()
    template.text(row, "assistant", "row 1", [kind], notes)
    assert notes[f"lost: {kind}"] == 1


def test_what_is_only_read_may_be_lost_and_is_named() -> None:
    earlier = said("<think>fog</think>Yes.", refusal="no", mood="good")
    source = turns_of("<a>{{ m.content.split('</think>')[-1] }}{{ m.mood }}")
    notes: Counter[str] = Counter()
    row = formats.convert({"messages": [ASKED, earlier, ASKED, said("No.", weight=1)]}, "messages", "row 1")
    plain(source).text(row, "last", "row 1", (), notes)
    assert notes == {"lost: reasoning of a turn that is only read": 1, "lost: refusal, a key of a turn": 1}


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ 'a' * 10**11 }}",
        "{{ 'a' | center(10**11) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_ended(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, hostile: str) -> None:
    """Ours and transformers' own way to it; afterwards the process is as it was."""
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "MOST_BYTES", 1 << 28)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    tiny_tokenizer.chat_template = hostile
    for render in (
        lambda: plain(hostile).text(TWO_ANSWERS, "assistant", "row 1"),
        lambda: tiny_tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        lambda: chat.complete(tiny_tokenizer),
    ):
        with pytest.raises(ModelError, match=r"^model.name: its chat template needs over .* for one conversation"):
            render()
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ 1/0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 10 ** 1000000000 }}",
        "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
        "{{ (5).to_bytes(10 ** 9) }}",
    ],
)
def test_a_template_that_fails_refuses_the_row(hostile: str) -> None:
    with pytest.raises(Unusable, match="^refused by the chat template") as caught:
        plain(hostile).text(TWO_ANSWERS, "assistant", "row 1")
    assert len(str(caught.value)) < 160
