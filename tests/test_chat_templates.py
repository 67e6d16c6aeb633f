"""data.chat_template: each known format as its makers document it, and the commands from a file to a merged model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from fasttune import cli, config
from fasttune.data import chat, chat_templates
from fasttune.errors import ConfigError, DataError, OutputError

TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
# As each page that the template's first line names has it, BOS left out; </s> stands for EOS.
DOCUMENTED = {
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nV"
    "<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] S\n\nU[/INST] A</s>[INST] V[/INST]",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nV<|end|>\n<|assistant|>\n",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n",
}


def test_every_known_format_is_as_documented() -> None:
    assert set(DOCUMENTED) == set(chat_templates.NAMES)
    for name, text in DOCUMENTED.items():
        template = chat.Template(chat_templates.read(name), {"eos_token": "</s>"}, adds_bos=False)
        assert template.render(TURNS, ask=True) == text, name
        assert template.source.startswith("{#- ") and "https://" in template.source.partition("-#}")[0], name


@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_labels_can_be_placed_in_every_known_format(name: str) -> None:
    """Prefixes are rendered consistently, and what closes an answer is supervised."""
    from fasttune.data.formats import Conversation

    template = chat.Template(chat_templates.read(name), {"eos_token": "</s>"}, adds_bos=False)
    turns = [*TURNS, {"role": "assistant", "content": "B"}]
    text, spans = template.text(Conversation(turns, [2, 4]), "assistant", "here")
    closing = {"gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}
    end = closing.get(name, "<|im_end|>" if name in ("chatml", "qwen") else "</s>")
    assert [text[a:b].strip() for a, b in spans] == [f"A{end}", f"B{end}"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("llama3", "would end with <|eot_id|>, which this tokenizer writes as 10 tokens"),
        ("{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}", "<end_of_turn>, which .* as 13 tokens"),
        ("no/such.jinja", r"no file that can be read .* one of alpaca, chatml"),
        ("{% for %}", "is no jinja template"),
    ],
)
def test_a_template_that_teaches_nothing_is_refused(tiny_tokenizer: Any, given: str, told: str) -> None:
    with pytest.raises(DataError, match=told.replace("|", r"\|")) as caught:
        chat.complete(tiny_tokenizer, given)
    assert "\n" not in str(caught.value)
    if "which this" in told:
        fits = str(caught.value).rpartition(": ")[2].split(", ")
        assert {"alpaca", "chatml", "mistral", "qwen"} <= set(fits) and not {"llama3", "gemma", "phi3"} & set(fits)


def test_an_empty_template_is_none(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(DataError, match="is empty; name one of alpaca"):
        chat.complete(tiny_tokenizer, str(tmp_path / "empty.jinja"))


def test_tokens_that_are_ordinary_text_are_named(tiny_tokenizer: Any) -> None:
    changes = dict(chat.complete(tiny_tokenizer, "zephyr"))
    assert changes["zephyr"] == "data.chat_template, not the tokenizer's own"
    assert changes["<|assistant|>, <|system|>, <|user|> as ordinary text"] == "the tokenizer has no such tokens"


def test_it_is_refused_where_it_would_be_ignored(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "model": {"name": "builtin:tiny"},
        "data": {"train": "rows.jsonl", "chat_template": "chatml"},
    }
    for change in ({"format": "text"}, {"layout": "concat"}):
        with pytest.raises(ConfigError, match="chat_template would be ignored"):
            config.parse({**tree, "data": tree["data"] | change})
    from fasttune.core import prepare

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Plain."}\n')
    with pytest.raises(ConfigError, match="plain text has no turns"):
        prepare.check_sources_and_model(config.parse({**tree, "data": tree["data"] | {"train": str(path)}}))


def test_the_commands_train_answer_and_merge_in_it(tmp_path: Path, cache: Path, capsys: Any, unsloth: None) -> None:
    file, run = tmp_path / "mine.jinja", tmp_path / "run"
    file.write_text("{% for m in messages %}<<{{ m.role }}>> {{ m.content }}{{ eos_token }}\n{% endfor %}"
                    "{% if add_generation_prompt %}<<assistant>> {% endif %}")  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}!"}) + "\n" for n in range(8)))
    tree = {
        "model": {"name": "builtin:tiny", "max_length": 64},
        "lora": {"rank": 4},
        "data": {"train": str(rows)},
        "train": {"batch_rows": 4, "max_steps": 2},
        "checkpoint": {"every": "1 steps"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    command = ["train", str(tmp_path / "tiny.yaml"), f"output_dir={run}", f"data.chat_template={file}"]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    own = (
        len("<<user>> 0?") + 1 + 1 + len("<<assistant>> 0!") + 1
    )  # a byte, and EOS, is a token; the last line break is cut
    assert result["tokens"] == 2 * 4 * own
    from fasttune.core import pretrained
    from fasttune.settings import ModelConfig

    saved = pretrained.read_tokenizer(ModelConfig(name=str(run / "adapter")))
    assert saved.chat_template == file.read_text() and len(list(cache.iterdir())) == 1
    assert cli.main(["generate", str(run), "--prompt", "0?", "--max-new-tokens", "2", "--json"]) == 0
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged = pretrained.read_tokenizer(ModelConfig(name=str(tmp_path / "merged")))
    assert merged.chat_template == saved.chat_template


def test_a_resume_with_another_template_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert tiny_run.run(folder, after=tiny_run.break_off_after(5)).status == "failed"
    with pytest.raises(OutputError, match="data.chat_template was None, is sha256"):
        tiny_run.run(folder, {"data": {"chat_template": "alpaca"}}, resume=True)
