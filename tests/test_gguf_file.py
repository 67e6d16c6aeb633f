"""GGUF files, read back: by gguf's reader (tensors, tokenizer) and by transformers' loader (the same logits)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fasttune import cli
from fasttune.core import pretrained
from fasttune.errors import ModelError
from fasttune.tools import gguf_file, modelfile

pytestmark = pytest.mark.usefixtures("unsloth")

SIZES: dict[str, Any] = {
    "vocab_size": 264,  # five rows more than the tokenizer has tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def made(folder: Path, tokenizer: Any, kind: str, **more: Any) -> Any:
    """A random model of a family, with vectors that are no ones and zeros, and matrices as bf16 holds them."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 203)[None]).logits


def loaded(file: Path) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


FAMILIES = [
    ("Llama", {}),
    ("Llama", {"head_dim": 32, "tie_word_embeddings": True}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 128}),
]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(("kind", "more"), FAMILIES)
def test_transformers_reads_the_same_model(tiny_tokenizer: Any, tmp_path: Path, kind: str, more: Any) -> None:
    import torch

    model = made(tmp_path, tiny_tokenizer, kind, **more)
    gguf_file.write(tmp_path, tmp_path / "m.gguf", "bf16")
    whole = logits(model)
    assert torch.equal(logits(loaded(tmp_path / "m.gguf")), whole)
    gguf_file.write(tmp_path, tmp_path / "q.gguf", "q8_0")
    difference = (logits(loaded(tmp_path / "q.gguf")) - whole).norm() / whole.norm()
    assert 0 < difference < 0.05


def test_tensors_and_facts_are_read_back(tiny_tokenizer: Any, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    model = made(tmp_path, tiny_tokenizer, "Llama", rope_parameters=LLAMA_3_ROPE, max_position_embeddings=512)
    for kind in ("bf16", "q8_0"):
        gguf_file.write(tmp_path, tmp_path / f"{kind}.gguf", kind)
    read = gguf.GGUFReader(tmp_path / "bf16.gguf")
    small = {each.name: each for each in gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors}
    wanted = {name: values.detach().numpy() for name, values in model.state_dict().items()}
    q = wanted["model.layers.1.self_attn.q_proj.weight"].reshape(4, 2, 8, 64)  # (heads, half, pair, in)
    seen = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in read.tensors}
    assert np.array_equal(seen["blk.1.attn_q.weight"].reshape(4, 8, 2, 64), q.swapaxes(1, 2))
    same = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    same |= {"blk.0.attn_v": "model.layers.0.self_attn.v_proj", "blk.1.ffn_down": "model.layers.1.mlp.down_proj"}
    for ours, theirs in same.items():
        assert np.array_equal(seen[f"{ours}.weight"], wanted[f"{theirs}.weight"]), ours
    assert len(seen) == len(wanted) + 1  # rope_freqs
    for name, values in seen.items():  # q8_0: at most half a step of each block of 32 off, and its scale is rounded
        again = gguf.dequantize(small[name].data, small[name].tensor_type)
        steps = np.abs(values.reshape(-1, 32)).max(1) / 127 if values.ndim == 2 else np.zeros(1)
        assert np.all(np.abs(again - values).reshape(len(steps), -1) <= 0.57 * steps[:, None]), name
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    inside = LlamaRotaryEmbedding(model.config).inv_freq.numpy()
    assert np.allclose(plain / seen["rope_freqs.weight"], inside, rtol=1e-6)
    assert seen["rope_freqs.weight"].max() == pytest.approx(8)
    fact = {name: field.contents() for name, field in read.fields.items()}
    assert (fact["general.architecture"], fact["llama.context_length"]) == ("llama", 512)
    assert fact["llama.rope.freq_base"] == 500000 and fact["llama.attention.key_length"] == 16
    tokens, kinds = fact["tokenizer.ggml.tokens"], fact["tokenizer.ggml.token_type"]
    assert tokens[:259] == tiny_tokenizer.convert_ids_to_tokens(range(259)) and tokens[263] == "[PAD263]"
    assert kinds == [3] * 3 + [1] * 256 + [5] * 5
    assert fact["tokenizer.chat_template"] == tiny_tokenizer.chat_template
    assert [fact[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")] == [1, 2, 2]
    assert fact["tokenizer.ggml.add_bos_token"] is False and fact["tokenizer.ggml.pre"] == "gpt-2"


REFUSED = [
    ("Gemma", {}, "gemma is not among llama, qwen2, qwen3"),
    ("Llama", {"attention_bias": True}, "a Llama with biases"),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope of type linear"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding window"),
    ("Llama", {"hidden_act": "gelu"}, "the activation gelu"),
]


@pytest.mark.parametrize(("kind", "more", "why"), REFUSED)
def test_what_was_not_verified_is_refused_by_name(tiny_tokenizer: Any, kind: str, more: Any, why: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    with pytest.raises(ModelError, match=why) as caught:
        gguf_file.check(config, tiny_tokenizer)
    assert "convert_hf_to_gguf.py" in str(caught.value) and "\n" not in str(caught.value)


def test_how_text_is_split_is_known_or_refused(tiny_tokenizer: Any) -> None:
    from tokenizers import Regex, pre_tokenizers as split
    from transformers import LlamaConfig

    bytes_only = split.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_and_words = split.ByteLevel(add_prefix_space=False)
    cases: list[tuple[Any, str | None]] = [
        (split.Sequence([split.Digits(individual_digits=True), bytes_and_words]), "smollm"),
        (split.Sequence([split.Digits(), bytes_and_words]), None),
        (split.Sequence([split.Split(Regex(r"\p{N}"), "isolated"), bytes_only]), None),
        (split.ByteLevel(add_prefix_space=True), None),
        (split.Metaspace(), None),
    ]
    for pattern, name in gguf_file.SPLITS.items():
        cases.append((split.Sequence([split.Split(Regex(pattern), "isolated"), bytes_only]), name))
    for made_of, name in cases:
        tiny_tokenizer.backend_tokenizer.pre_tokenizer = made_of
        assert gguf_file.pre_tokenizer(tiny_tokenizer) == name
        if name is None:
            with pytest.raises(ModelError, match="no byte-level BPE"):
                gguf_file.check(LlamaConfig(**SIZES), tiny_tokenizer)


QUANTIZE = """#!/bin/sh
[ "$3" = Q4_K_M ] && [ -s "$1" ] && cp "$1" "$2"
"""


def test_merge_writes_a_gguf_file_and_a_modelfile(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fasttune.tools import merge, merge_check

    fine = merge_check.Comparison("float32", "float32", 9, 1e-6, 1e-3, 0.1, 1.0, [], True)
    monkeypatch.setattr(merge, "compare", lambda *_: fine)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    out = tmp_path / "my model"
    arguments = ["merge", str(finished_run), "--out", str(out), "--gguf"]
    assert cli.main([*arguments, "q4_k_m"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "llama-quantize" in told[-1] and "releases" in told[-1] and not out.exists()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llama-quantize"
    program.write_text(QUANTIZE.replace("cp", shutil.which("cp", path="/bin:/usr/bin") or "cp"))
    program.chmod(0o755)
    for kind in ("q8_0", "q4_k_m"):
        assert cli.main([*arguments, kind, "--overwrite", "--json"]) == 0
        file = out / f"my model-{kind}.gguf"
        said = capsys.readouterr()
        assert json.loads(said.out)["gguf"] == str(file) and file.read_bytes()[:4] == b"GGUF"
        assert f"vllm serve '{out}'" in said.err and f"llama-server --jinja -m '{file}'" in said.err
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[1] == "FROM ./my model-q4_k_m.gguf" and 'PARAMETER stop "<|im_end|>"' in lines
    program.write_text("#!/bin/sh\necho no room >&2; exit 3\n")
    assert cli.main([*arguments, "q4_k_m", "--overwrite"]) == 1
    assert "llama-quantize failed: no room; the merged model is in" in capsys.readouterr().err
    assert (out / "config.json").is_file() and not list(out.glob("*.gguf")) + list(out.glob(".*"))


LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


LAST_TURN = (
    "{% for m in messages[-1:] %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_is_translated_exactly_or_not_at_all(tiny_tokenizer: Any) -> None:
    import transformers

    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=99)

    def text() -> str:
        return modelfile.text("m.gguf", config, tiny_tokenizer, [0, 2])

    def turn(role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    chatml = "{{- range .Messages }}" + turn("{{ .Role }}", "{{ .Content }}") + "{{ end }}<|im_start|>assistant\n"
    plain = text()
    assert f'TEMPLATE """{chatml}"""' in plain and "SYSTEM" not in plain and "PARAMETER num_ctx 99" in plain
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"' in plain
    said = turn("system", "Be kind").replace("\n", "\\n")
    before = "{% if messages[0]['role'] != 'system' %}{{ '" + said + "' }}{% endif %}"
    tiny_tokenizer.chat_template = before + tiny_tokenizer.chat_template
    assert f'TEMPLATE """{chatml}"""\nSYSTEM """Be kind"""' in text()
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("m['role'] +", "m['role'] | upper +")
    assert "TEMPLATE" not in text() and "`ollama show NAME --template`" in text()
    tiny_tokenizer.chat_template = LAST_TURN
    assert "TEMPLATE" not in text()  # the same of one question, not of several turns
    tiny_tokenizer.chat_template = LLAMA_3.replace("(bos_token if loop.first else '') + ", "")
    assert "{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant" in text()
    tiny_tokenizer.chat_template = LLAMA_3  # with a BOS that llama.cpp does not put there for this tokenizer
    assert "TEMPLATE" not in text()
    tiny_tokenizer.chat_template = None
    assert 'TEMPLATE """{{ .Prompt }}"""' in text()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_smollm2_is_read_back_with_its_tokenizer(tmp_path: Path) -> None:
    import torch
    import transformers

    folder = pretrained.builtin("builtin:smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    exact = logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float() if parameter.ndim == 2 else parameter.data
    for kind, allowed in (("bf16", 0.0), ("q8_0", 0.05)):
        file = tmp_path / f"{kind}.gguf"
        gguf_file.write(folder, file, kind)
        wanted = logits(model) if kind == "bf16" else exact
        assert (logits(loaded(file)) - wanted).norm() <= allowed * wanted.norm()
        read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        for text in ("Hello 1234 wörld, don't!\n\n  x<|im_end|>\n", "def f(x):\n\treturn  x\n"):
            assert read(text).input_ids == own(text).input_ids
    said = modelfile.translated(own)
    assert said and said[0] == modelfile.CHATML and said[1].startswith("You are a helpful AI assistant named SmolLM")
