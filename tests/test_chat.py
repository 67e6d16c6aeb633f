"""What of a conversation is trained on: real chat templates against a table made by hand; what templates do wrong."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttune.data import chat, tokenize
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
TOOL = {
    "type": "function",
    "function": {
        "name": "look_out",
        "description": 'says "wet" <or> dry',
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
TWO_ANSWERS = Conversation(MESSAGES, [1, 3])
UNCLOSED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)


@dataclass(frozen=True)
class Family:
    """A real template's special tokens, and by hand: the whole text, and what of each answer is trained on."""

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
    with pytest.raises(DataError, match="cannot be placed: set another template"):  # no hint that would not help
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
