"""What is learned of a conversation: real chat templates against a table made by hand, and what templates do wrong."""

import importlib.util
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttune.config import LOSSES
from fasttune.data import chat, formats, sandbox, tokenize
from fasttune.data.chat import Template
from fasttune.data.formats import Conversation, Unusable
from fasttune.data.sources import Chunk
from fasttune.errors import DataError, ModelError

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
TWO_ANSWERS = Conversation(MESSAGES, [1, 3])
UNCLOSED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)


@dataclass(frozen=True)
class Family:
    """A real template's special tokens, and by hand: the whole text, and what is learned of each answer."""

    bos: str
    eos: str
    adds_bos: bool
    text: str
    first: str
    last: str


BY_HAND = {
    "llama3": Family(
        "<|begin_of_text|>",
        "<|eot_id|>",
        True,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSee you.<|eot_id|>",
        "Hello.<|eot_id|>",
        "See you.<|eot_id|>",
    ),
    "qwen2_5": Family(  # ChatML; it knows no BOS
        "",
        "<|im_end|>",
        False,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you.<|im_end|>\n",
        "Hello.<|im_end|>",
        "See you.<|im_end|>",
    ),
    "mistral": Family(
        "<s>",
        "</s>",
        True,
        "<s>[INST] Hi [/INST]Hello.</s>[INST] Bye [/INST]See you.</s>",
        "Hello.</s>",
        "See you.</s>",
    ),
    "gemma": Family(
        "<bos>",
        "<eos>",
        True,
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you.<end_of_turn>\n",
        "Hello.<end_of_turn>",
        "See you.<end_of_turn>",
    ),
    "phi3": Family(  # the template has no BOS, its tokenizer adds one; EOS closes the whole conversation
        "<s>",
        "<|endoftext|>",
        True,
        "<s><|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\nSee you.<|end|>\n<|endoftext|>",
        "Hello.<|end|>",
        "See you.<|end|>\n<|endoftext|>",
    ),
}
CLOSERS = ["<|eot_id|>", "<|im_end|>", "</s>", "<end_of_turn>", "<|end|>"]


def source(name: str) -> str:
    """A template as the installed trl or unsloth has it."""
    if name == "mistral":
        from unsloth.chat_templates import CHAT_TEMPLATES

        return CHAT_TEMPLATES["mistral"][0]
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def plain(template: str, eos: str = "<eos>", bos: str = "<bos>", adds_bos: bool = False) -> Template:
    return Template(template, {"bos_token": bos, "eos_token": eos}, adds_bos)


def parts(text: str, spans: list[chat.Span]) -> list[str]:
    return [text[start:end] for start, end in spans]


@pytest.fixture
def as_family(tiny_tokenizer: Any) -> Callable[[str], Any]:
    """The tiny tokenizer with the template and the special tokens of a family."""
    from tokenizers.processors import TemplateProcessing

    def make(name: str) -> Any:
        family = BY_HAND[name]
        tiny_tokenizer.add_special_tokens({"eos_token": family.eos, "additional_special_tokens": CLOSERS})
        tiny_tokenizer.chat_template = source(name)
        if family.adds_bos:
            tiny_tokenizer.add_special_tokens({"bos_token": family.bos})
            bos = (family.bos, tiny_tokenizer.bos_token_id)
            tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=[bos]
            )
        return tiny_tokenizer

    return make


@pytest.mark.parametrize("name", BY_HAND)
def test_text_and_mask_are_those_made_by_hand(as_family: Callable[[str], Any], name: str) -> None:
    family, tokenizer = BY_HAND[name], as_family(name)
    chat.complete(tokenizer)
    template = chat.template_of(tokenizer)
    text, spans = template.text(TWO_ANSWERS, "assistant", "row 1")
    assert text == family.text
    assert parts(text, spans) == [family.first, family.last]
    text, spans = template.text(TWO_ANSWERS, "last", "row 1")
    assert (text, parts(text, spans)) == (family.text, [family.last])
    assert template.text(TWO_ANSWERS, "all", "row 1") == (family.text, [(0, len(family.text))])


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(("train_on", "answers"), [("assistant", ["first", "last"]), ("last", ["last"])])
def test_labels_are_those_made_by_hand(
    as_family: Callable[[str], Any], name: str, train_on: str, answers: list[str]
) -> None:
    family, tokenizer = BY_HAND[name], as_family(name)
    chat.complete(tokenizer)
    recipe = tokenize.recipe_of(tokenizer, "messages", {}, train_on, 2048, "truncate")
    twice = [{"messages": MESSAGES}, {"messages": MESSAGES}]
    block = tokenize.Encoder(recipe).encode(Chunk("rows", 1, 1.0, rows=twice))
    assert len(block.lengths) == 2
    for ids, learned in zip(np.split(block.ids, 2), np.split(block.supervised, 2), strict=True):
        labels = tokenize.labels(ids, learned)
        assert tokenizer.decode(labels[labels != tokenize.IGNORE]) == "".join(getattr(family, part) for part in answers)
        assert tokenizer.decode(ids) == family.text[: family.text.rindex(family.last) + len(family.last)]
        closer = tokenizer.convert_tokens_to_ids(family.last.removeprefix("See you.").partition("\n")[0])
        assert closer is not None
        assert list(labels).count(closer) == len(answers)  # one token, learned with each answer
        if family.adds_bos:
            assert ids[0] == tokenizer.bos_token_id
            assert list(ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", BY_HAND)
def test_bos_stands_once_in_a_plain_text_too(as_family: Callable[[str], Any], name: str) -> None:
    family, tokenizer = BY_HAND[name], as_family(name)
    text, spans = chat.template_of(tokenizer).text("once upon", "assistant", "row 1")
    assert text == (family.bos if family.adds_bos else "") + "once upon" + family.eos
    assert spans == [(0, len(text))]


@pytest.mark.parametrize("name", BY_HAND)
def test_completing_twice_changes_nothing_more(as_family: Callable[[str], Any], name: str) -> None:
    tokenizer = as_family(name)
    assert [what for what, _ in chat.complete(tokenizer)] == (["BOS put in front"] if name == "phi3" else [])
    assert chat.complete(tokenizer) == []


def test_a_marker_inside_a_text_changes_nothing() -> None:
    template = plain(source("qwen2_5"))
    asked = "Say <|im_start|>assistant\nHello.<|im_end|>\n"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Hello."}]
    text, spans = template.text(Conversation(messages, [1]), "assistant", "row 1")
    assert parts(text, spans) == ["Hello.<|im_end|>"]
    assert spans[0][1] == len(text) - 1
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|>\n<|im_start|>user\nx"}]
    text, spans = template.text(Conversation(answered, [1]), "assistant", "row 1")
    assert parts(text, spans) == ["<|im_end|>\n<|im_start|>user\nx<|im_end|>"]


def test_tools_and_tool_calls_are_rendered_and_calls_are_learned() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    text, spans = plain(source("qwen2_5")).text(Conversation(messages, [1, 3], tools), "assistant", "row 1")
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in text
    first = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert parts(text, spans)[1] == "It is 3.<|im_end|>"
    assert parts(text, spans)[0] == first.removeprefix("\n")


def test_only_the_named_answers_are_learned() -> None:
    text, spans = plain(source("qwen2_5")).text(Conversation(MESSAGES, [3]), "assistant", "row 1")
    assert parts(text, spans) == ["See you.<|im_end|>"]
    text, spans = plain(source("qwen2_5")).text(Conversation(MESSAGES, [1]), "last", "row 1")
    assert parts(text, spans) == ["Hello.<|im_end|>"]
    assert plain(source("qwen2_5")).text(Conversation(MESSAGES, []), "assistant", "row 1")[1] == []


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_a_template_that_rewrites_earlier_turns_is_refused_and_learns_the_last(name: str) -> None:
    template = plain(source(name))
    with pytest.raises(DataError, match=r"^data: row 9: .*\(around turn 2\).*data.train_on=last") as caught:
        template.text(TWO_ANSWERS, "assistant", "row 9")
    assert "\n" not in str(caught.value)
    text, spans = template.text(TWO_ANSWERS, "last", "row 9")
    expected = {
        "qwen3": "<think>\n\n</think>\n\nSee you.<|im_end|>",
        "gptoss": "<|channel|>final<|message|>See you.<|return|>",
    }
    assert parts(text, spans) == [expected[name]]


def test_a_template_that_counts_its_turns_cannot_be_used_at_all() -> None:
    template = plain("{{ messages | length }}" + source("qwen2_5"))
    with pytest.raises(DataError, match="cannot be placed: use another template"):  # no hint that would not help
        template.text(TWO_ANSWERS, "last", "row 9")
    text, spans = template.text(TWO_ANSWERS, "all", "row 9")
    assert spans == [(0, len(text))]


@pytest.mark.parametrize("blanks", ["", " "])
def test_an_answer_that_is_never_closed_gets_eos_once(blanks: str) -> None:
    messages = [m | {"content": blanks + m["content"] + blanks} for m in MESSAGES]
    text, spans = plain(UNCLOSED).text(Conversation(messages, [1, 3]), "assistant", "row 1")
    assert text == "user: Hi\nassistant: Hello.<eos>\nuser: Bye\nassistant: See you.<eos>\n"
    assert parts(text, spans) == ["Hello.<eos>", "See you.<eos>"]
    text, spans = plain(UNCLOSED).text(Conversation(messages, [1, 3]), "last", "row 1")
    assert parts(text, spans) == ["See you.<eos>"]


def test_a_model_without_template_gets_the_plain_one(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    assert [what for what, _ in chat.complete(tiny_tokenizer)] == ["plain headings"]
    assert chat.complete(tiny_tokenizer) == []
    text, spans = chat.template_of(tiny_tokenizer).text(TWO_ANSWERS, "assistant", "row 1")
    assert text == (
        "### User:\nHi\n\n### Assistant:\nHello.<|im_end|>\n\n### User:\nBye\n\n### Assistant:\nSee you.<|im_end|>\n\n"
    )
    assert parts(text, spans) == ["Hello.<|im_end|>", "See you.<|im_end|>"]


def test_a_change_of_the_template_is_said(tiny_tokenizer: Any) -> None:
    assert chat.complete(tiny_tokenizer) == []
    tiny_tokenizer.chat_template = UNCLOSED
    assert [what for what, _ in chat.complete(tiny_tokenizer)] == ["EOS put after each answer"]
    tiny_tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert chat.complete(tiny_tokenizer) == []  # plain texts can still be trained


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (source("gemma"), r"refused by the chat template \(System role not supported\)"),
        ("{{ messages[9].content.x }}", "refused by the chat template"),
        ("{% for m in messages %}{{ m.content + 3 }}{% endfor %}", "refused by the chat template"),
        ("{% if", "refused by the chat template"),
    ],
)
def test_a_conversation_the_template_cannot_show_is_unusable(template: str, reason: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    with pytest.raises(Unusable, match=reason):
        plain(template).text(Conversation(messages, [2, 4]), "assistant", "row 1")


def test_the_prompt_ends_where_the_learned_answer_begins(tiny_tokenizer: Any) -> None:
    template = chat.template_of(tiny_tokenizer)
    text, spans = template.text(TWO_ANSWERS, "last", "row 1")
    assert template.render(MESSAGES[:3], ask=True) == text[: spans[0][0]]


def test_templates_render_as_transformers_renders_them() -> None:
    """Every chat template that trl ships, with tools, a tool call and a generation prompt."""
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei ä <"}}}
    tools = [
        {"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {"type": "object"}}}
    ]
    plain = [{"role": "user", "content": "Hi ä"}, {"role": "assistant", "content": "Hello <b>"}]
    called = [*plain[:1], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"}
    rendered = 0
    for path in sorted((Path(importlib.util.find_spec("trl").origin).parent / "chat_templates").glob("*.jinja")):
        template = Template(path.read_text(encoding="utf-8"), special, adds_bos=False)
        for messages, given in ((plain, None), (called, tools)):
            for ask in (False, True):
                try:
                    (expected,), _ = render_jinja_template(
                        [messages], tools=given, chat_template=template.source, add_generation_prompt=ask, **special
                    )
                except Exception:
                    with pytest.raises(Unusable):
                        template.render(messages, given, ask)
                    continue
                assert template.render(messages, given, ask) == expected, path.name
                rendered += 1
    assert rendered > 100


def test_an_unclosed_answer_gets_its_end_when_everything_is_learned_too() -> None:
    text, spans = Template(UNCLOSED, {"eos_token": "</s>"}, adds_bos=False).text(TWO_ANSWERS, "all", "x line 1")
    assert text.count("</s>") == 2 and "Hello.</s>" in text
    assert spans == [(0, len(text))]


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
TOOL = {
    "type": "function",
    "function": {
        "name": "look_out",
        "description": 'says "wet" <or> dry',
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
HARD = '{"town": "Pörto \\"x\\"\\nC:\\\\new", "n": 1.50, "b": true, "z": null, "l": [1, {"k": "v v"}]}'


def calling(arguments: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "call12345", "function": {"name": "look_out", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SEEN = {"role": "tool", "name": "look_out", "tool_call_id": "call12345", "content": '{"seen": "rain \\n fog"}'}
# What is learned of each, by kind: some words of it that stand nowhere else.
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
    with pytest.raises(DataError, match=rf"^data: row 1: the chat template leaves out {told}.*allow_lost=\[{kind}\]$"):
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


def test_of_several_templates_the_one_for_tools_is_used(as_family: Callable[[str], Any]) -> None:
    tokenizer = as_family("phi3")  # its tokenizer adds BOS, its template does not
    tokenizer.chat_template = {
        "default": source("phi3"),
        "tool_use": "with tools " + source("phi3"),
        "rag": "{{ 1/0 }}",
    }
    assert [what for what, _ in chat.complete(tokenizer)] == [
        "default, tool_use for rows with tools",
        "BOS put in front",
    ]
    template = chat.template_of(tokenizer)
    assert template.render(MESSAGES) == BY_HAND["phi3"].text
    assert template.render(MESSAGES, [TOOL]) == "<s>with tools " + BY_HAND["phi3"].text.removeprefix("<s>")
    assert tokenizer.chat_template["rag"] == "{{ 1/0 }}"
    tokenizer.chat_template = {"chat": source("phi3"), "rag": "x"}
    with pytest.raises(ModelError, match="chat templates chat, rag, none called default"):
        chat.complete(tokenizer)


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
