"""A merged model as one GGUF file, for llama.cpp, Ollama and LM Studio: weights, tokenizer and chat template.

Only families whose files were read back and compared, and that llama.cpp was seen to run: Llama (SmolLM2, Llama 3.x),
Qwen 2 and 2.5, Qwen 3, with byte-level BPE. Every other one is refused by name.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (keys), llama.cpp's convert_hf_to_gguf.py (the order
of the rows of q and k, rope_freqs, token types, names of pre-tokenizers).
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fasttune.core import pretrained
from fasttune.data import chat
from fasttune.errors import FasttuneError, ModelError, RunFailed, last_line
from fasttune.settings import ModelConfig

KINDS = ("bf16", "q8_0", "q4_k_m")
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type → general.architecture
FILE_TYPES = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
QUANTIZER = "llama-quantize"
OTHERS = "llama.cpp's own converter knows more: python convert_hf_to_gguf.py DIR (github.com/ggml-org/llama.cpp)"
# How text is split before the merges: the regex of tokenizer.json → tokenizer.ggml.pre.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
SPACES = r"|\s+(?!\S)|\s+"
SPLITS = {WORDS % "{1,3}" + SPACES: "llama-bpe", WORDS % "" + SPACES: "qwen2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

Tensor = tuple[str, Any]  # GGUF's name, values as float32 (numpy)


def check_program(kind: str) -> None:
    """Before the work is done. Raises FasttuneError where q4_k_m is asked for and llama.cpp's program is not there."""
    if kind == "q4_k_m" and not shutil.which(QUANTIZER):
        raise FasttuneError(
            f"--gguf q4_k_m: needs {QUANTIZER} on the path, it comes with llama.cpp "
            "(github.com/ggml-org/llama.cpp/releases, or `brew install llama.cpp`); --gguf q8_0 needs nothing"
        )


def check(config: Any, tokenizer: Any) -> None:
    """That this model can be written exactly. Raises ModelError, which names what is not known here."""
    rope = getattr(config, "rope_parameters", None) or {}
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    problem = None
    if config.model_type not in ARCHITECTURES:
        problem = f"{config.model_type} is not among {', '.join(ARCHITECTURES)}"
    elif getattr(config, "quantization_config", None):
        problem = "its weights are quantized"
    elif sliding:
        problem = "attention in a sliding window"
    elif config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        problem = "a Llama with biases"
    elif config.hidden_act != "silu":
        problem = f"the activation {config.hidden_act}"
    elif rope.get("rope_type", "default") not in ("default", "llama3"):
        problem = f"rope of type {rope['rope_type']}"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        problem = "rope of a part of each head"
    problem = problem or _unknown_tokenizer(tokenizer)
    if problem:
        raise ModelError(f"--gguf: {problem}: not supported here; merge without --gguf. {OTHERS}")


def write(folder: Path, target: Path, kind: str, progress: Callable[[float], None] = lambda share: None) -> None:
    """DIR of a merged model → one GGUF file; one tensor at a time is in memory.

    kind: bf16 (matrices in bfloat16), q8_0 (in blocks of 32 int8 with one scale, bf16 where the rows are no multiple of
    32), or q4_k_m (llama.cpp's own program, from bf16). Vectors stay float32. Raises ModelError, RunFailed.
    """
    if kind == "q4_k_m":
        whole = target.with_name(f".{target.name}.bf16")
        try:
            write(folder, whole, "bf16", progress)
            _quantize(whole, target)
        finally:
            whole.unlink(missing_ok=True)
        return
    import gguf

    source = ModelConfig(name=str(folder))
    config, tokenizer = pretrained.read_architecture(source), pretrained.read_tokenizer(source)
    check(config, tokenizer)
    writer = gguf.GGUFWriter(target, ARCHITECTURES[config.model_type])
    _facts(writer, config, folder.name, kind)
    _vocabulary(writer, config, tokenizer)
    # Twice through the files: a GGUF file says first what comes and then brings it.
    count = 0
    for name, values in tensors(folder, config):
        stored = _stored(values, kind)
        writer.add_tensor_info(name, values.shape, values.dtype, gguf.quantize(values, stored).nbytes, stored)
        count += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for at, (_, values) in enumerate(tensors(folder, config)):
        writer.write_tensor_data(gguf.quantize(values, _stored(values, kind)))
        progress((at + 1) / count)
    writer.close()


def tensors(folder: Path, config: Any) -> Iterator[Tensor]:
    """All weights under GGUF's names. Raises ModelError for one that has none there."""
    import gguf
    import safetensors
    import torch

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  no dict
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                found = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if found is None:
                    raise ModelError(f"--gguf: the weight {name} has no name in a GGUF file of {config.model_type}")
                yield found, _in_order(found, shard.get_tensor(name).to(torch.float32).numpy(), config)
    if config.rope_parameters.get("rope_type") == "llama3":
        yield gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", rope_factors(config)


def _in_order(name: str, values: Any, config: Any) -> Any:
    """Rows of q and k as llama.cpp turns them: neighbours in pairs, where transformers pairs the halves of a head."""
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    count = heads.get(name.partition(".")[2].partition(".")[2]) if config.model_type == "llama" else None
    if count is None:  # llama.cpp turns those of the other families as transformers does
        return values
    rows, columns = values.shape
    return values.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope_factors(config: Any) -> Any:
    """Llama 3.1's stretched rope: by what each frequency is divided, (head_dim / 2,) float32."""
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(stretched)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return (plain / stretched).numpy().astype(np.float32)


def _stored(values: Any, kind: str) -> Any:
    """The type of one tensor in the file."""
    import gguf

    types = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return types.F32
    return types.Q8_0 if kind == "q8_0" and values.shape[-1] % 32 == 0 else types.BF16


def _facts(writer: Any, config: Any, name: str, kind: str) -> None:
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _vocabulary(writer: Any, config: Any, tokenizer: Any) -> None:
    """Tokens with their kinds, merges, special tokens and the chat template."""
    pretrained.check_tokens(tokenizer, config.vocab_size)
    tokens = [f"[PAD{at}]" for at in range(config.vocab_size)]  # rows of the embeddings without a token
    kinds = [UNUSED] * config.vocab_size
    for text, at in tokenizer.get_vocab().items():
        tokens[at], kinds[at] = text, NORMAL
    for at, added in tokenizer.added_tokens_decoder.items():
        tokens[at], kinds[at] = added.content, CONTROL if added.special else USER_DEFINED
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model["merges"]:
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    ids = tokenizer("x").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(chat.template_of(tokenizer).source)
        if (end := end_of_turn(tokenizer)) is not None:
            writer.add_eot_token_id(end)  # ends an answer beside EOS


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template closes a turn."""
    closing = chat.template_of(tokenizer).closing
    first = tokenizer(closing, add_special_tokens=False).input_ids[:1] if closing else []
    return next((token for token in first if token in tokenizer.added_tokens_decoder), None)


def _unknown_tokenizer(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "is_fast", False):
        return "its tokenizer has no tokenizer.json"
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or pre_tokenizer(tokenizer) is None:
        return "its tokenizer is no byte-level BPE that splits text as Llama 3, Qwen, SmolLM or GPT-2 do"
    return None


def pre_tokenizer(tokenizer: Any) -> str | None:
    """tokenizer.ggml.pre of a byte-level tokenizer; None of one that splits text otherwise."""
    said = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    parts = said.get("pretokenizers", [said])
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    before = parts[:-1]
    if not before:
        return "gpt-2" if last["use_regex"] else None
    if len(before) > 1:
        return None
    if before[0]["type"] == "Digits":
        return "smollm" if before[0]["individual_digits"] and last["use_regex"] else None
    if before[0]["type"] != "Split" or last["use_regex"] or before[0].get("behavior") != "Isolated":
        return None
    return SPLITS.get(before[0]["pattern"].get("Regex", ""))


def _quantize(whole: Path, target: Path) -> None:
    done = subprocess.run([QUANTIZER, str(whole), str(target), "Q4_K_M"], capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        target.unlink(missing_ok=True)
        raise RunFailed(f"--gguf: {QUANTIZER} failed: {last_line(done.stderr, f'code {done.returncode}')}")
