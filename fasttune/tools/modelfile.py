"""An Ollama Modelfile beside a GGUF file: which file, where an answer ends, how long a text may be, the chat template.

Ollama writes templates in Go, models bring Jinja: only the two below are translated, and only where the model's own
template makes of three conversations, character by character, what the translation stands for.
Sources: https://docs.ollama.com/modelfile, https://docs.ollama.com/template
"""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fasttune.core import decoding
from fasttune.data import chat
from fasttune.data.formats import Message, Unusable

CONTEXT = 8192  # tokens, at most: Ollama sets memory aside for all of them
SYSTEM = "be brief"
TALKS: list[list[Message]] = [
    [{"role": "user", "content": "one?"}],
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "one?"}],
    [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two."},
        {"role": "user", "content": "three?"},
    ],
]


@dataclass(frozen=True)
class Form:
    """How a turn is written: before the role, between role and text, after the text; and the same in Go."""

    start: str
    middle: str
    end: str

    def of(self, messages: list[Message]) -> str:
        turns = "".join(f"{self.start}{turn['role']}{self.middle}{turn['content']}{self.end}" for turn in messages)
        return f"{turns}{self.start}assistant{self.middle}"

    @property
    def go(self) -> str:
        turn = f"{self.start}{{{{ .Role }}}}{self.middle}{{{{ .Content }}}}{self.end}"
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.start}assistant{self.middle}"


CHATML = Form("<|im_start|>", "\n", "<|im_end|>\n")
LLAMA_3 = Form("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")


def text(gguf_name: str, config: Any, tokenizer: Any, stops: list[int]) -> str:
    """The Modelfile. stops: ids of tokens that end an answer."""
    lines = [f"# ollama create NAME -f Modelfile && ollama run NAME\nFROM ./{gguf_name}"]
    found = translated(tokenizer)
    if found:
        form, system = found
        lines.append(f'TEMPLATE """{form.go}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    elif tokenizer.chat_template:
        lines.append(
            "# The chat template of this model is none that fasttune can write in Ollama's language. The GGUF file\n"
            "# holds it: newer versions of Ollama read it there; check with `ollama show NAME --template`."
        )
    else:
        lines.append('# Trained without a chat template: a text is continued as it is.\nTEMPLATE """{{ .Prompt }}"""')
    lines += [f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(token))}" for token in stops]
    lines.append(f"PARAMETER num_ctx {min(CONTEXT, config.max_position_embeddings)}")
    return "\n".join(lines) + "\n"


def translated(tokenizer: Any) -> tuple[Form, str] | None:
    """(the form that the chat template writes, the system text it puts where none is given); None of any other.

    Texts without white space at their ends: a template that trims them is still the same form.
    """
    if not tokenizer.chat_template:
        return None
    template = chat.template_of(tokenizer)
    try:
        # llama.cpp puts BOS in front itself, as the tokenizer does
        alone, *others = (template.render(talk, ask=True).removeprefix(template.bos) for talk in TALKS)
    except Unusable:
        return None
    for form in (CHATML, LLAMA_3):
        if others != [form.of(talk) for talk in TALKS[1:]]:
            continue
        head, tail = f"{form.start}system{form.middle}", form.end + form.of(TALKS[0])
        system = alone[len(head) : -len(tail)] if alone.startswith(head) and alone.endswith(tail) else ""
        given = [{"role": "system", "content": system}, *TALKS[0]] if system else TALKS[0]
        if alone == form.of(given) and '"""' not in system:
            return form, system
    return None


def stops(config: Any, generation: Any, tokenizer: Any) -> list[int]:
    """As `fasttune generate` ends an answer."""
    return decoding.stop_ids(SimpleNamespace(generation_config=generation or config), tokenizer)
