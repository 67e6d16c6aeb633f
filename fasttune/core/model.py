"""The only door to Unsloth: load a model, put an adapter on it, read back what really runs.

Importing this module imports unsloth, and unsloth must come before transformers, trl and peft, because it patches
them at import. So this is the one file that imports it, and everything that trains imports this file first.
"""

# isort: skip_file
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttune import cache, hub, paths
from fasttune.core import pretrained
from fasttune.config import LoraConfig, ModelConfig
from fasttune.cpu import memory
from fasttune.data import sandbox
from fasttune.errors import ModelError

# Before the import: no usage statistics, no telemetry, no unsloth_compiled_cache/ in the current folder.
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache.root() / "unsloth_compiled_cache"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns at every later fork
memory.ask_for_huge_pages()
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's registrations warn at every import

from unsloth import FastLanguageModel, tokenizer_utils

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
# A chat template is a stranger's program: bounded wherever it runs, and as `fasttune data` shows it, never repaired.
transformers.utils.chat_template_utils._compile_jinja_template = sandbox.Bounded
tokenizer_utils.fix_chat_template = lambda tokenizer: tokenizer.chat_template


def load(config: ModelConfig, dtype: str, gradient_checkpointing: str, full: bool, seed: int) -> tuple[Any, Any]:
    """Weights and tokenizer through Unsloth, in `dtype` (bfloat16 | float32); nothing swapped or quantized unasked."""
    source = pretrained.locate(config)
    if not torch.cuda.is_available():
        memory.keep_freed()
    with pretrained.explained(config.name):
        model, tokenizer = hub.patiently(
            lambda: FastLanguageModel.from_pretrained(
                model_name=source,
                max_seq_length=config.max_length,
                dtype=getattr(torch, dtype),
                load_in_4bit=config.quantization == "nf4",
                full_finetuning=full,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                use_gradient_checkpointing=_unsloth_checkpointing(gradient_checkpointing),
                use_exact_model_name=True,
                use_safetensors=True,  # a pickle may run code
                random_state=seed,
            )
        )
        tokenizer("x")  # some are read and break at the first text
    quantized = bool(getattr(model, "is_loaded_in_4bit", False))
    if quantized != (config.quantization == "nf4"):
        raise ModelError(
            f"model.quantization: asked for {config.quantization}, but the loaded weights are "
            f"{'4-bit' if quantized else 'not quantized'} on this machine; set it to {'nf4' if quantized else 'none'}"
        )
    tokenizer.padding_side = "right"
    return model, tokenizer


def add_lora(model: Any, config: LoraConfig, gradient_checkpointing: str, seed: int) -> Any:
    """A PEFT model with one trainable adapter. Raises ModelError if a target names no layer of this model."""
    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if missing := [target for target in config.targets if target not in layers]:
        raise ModelError(f"lora.targets: this model has no {', '.join(missing)}; it has {', '.join(sorted(layers))}")
    return FastLanguageModel.get_peft_model(
        model,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        use_rslora=config.rslora,
        init_lora_weights=True if config.init == "default" else config.init,
        use_gradient_checkpointing=_unsloth_checkpointing(gradient_checkpointing),
        random_state=seed,
    )


def save(model: Any, tokenizer: Any, folder: Path, initial_adapter: Path | None = None) -> None:
    """Adapter (PEFT format) or full weights as safetensors with the tokenizer; the folder appears only when complete.

    `initial_adapter` is what `save_initial` returned: with it a PiSSA adapter, which only fits the residual weights it
    was split from, is written as an ordinary LoRA adapter of twice the rank that fits the original model.
    Source: https://huggingface.co/docs/peft/developer_guides/lora#pissa
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as temp:
        made = Path(temp) / "made"
        extra = {"path_initial_model_for_weight_conversion": str(initial_adapter)} if initial_adapter else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PiSSA changes the base weights")  # the conversion undoes just that
            model.save_pretrained(made, **extra)
        (made / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        tokenizer.save_pretrained(made)
        paths.readable(made)
        if folder.exists():  # of the same run, before it was resumed
            folder.rename(Path(temp) / "old")
        made.rename(folder)


def save_initial(model: Any, config: LoraConfig, folder: Path) -> Path | None:
    """Keep a PiSSA adapter's start for `save`; None for an ordinary adapter, which needs none."""
    if config.init != "pissa":
        return None
    model.save_pretrained(folder)
    return folder


def for_inference(model: Any) -> None:
    FastLanguageModel.for_inference(model)


def for_training(model: Any, gradient_checkpointing: str) -> None:
    FastLanguageModel.for_training(model, use_gradient_checkpointing=gradient_checkpointing != "none")


def take_varlen_kernel() -> Callable[[], None] | None:
    """Let Unsloth run packs through torch 2.11's variable-length Flash Attention. Returns what undoes it, or None where
    Unsloth has a kernel by itself, UNSLOTH_TORCH_VARLEN=0 asks for none, or there is none.

    Unsloth waits for torch 2.12, whose public function has enable_gqa, and until then runs a pack as one SDPA call for
    every length in it. Its own autograd function calls aten._flash_attention_forward, which takes grouped keys in 2.11.
    Source: unsloth/utils/attention_dispatch.py (2026.10.9), torch/nn/attention/varlen.py (2.11.0).
    """
    from unsloth.utils import attention_dispatch as dispatch  # not made for a CPU-only import

    asked = os.environ.get("UNSLOTH_TORCH_VARLEN", "1").lower() not in ("0", "false", "no", "off")
    if dispatch.HAS_FLASH_ATTENTION or dispatch._TORCH_VARLEN_ATTN is not None or not asked:
        return None
    from torch.nn.attention.varlen import varlen_attn

    def attention(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
        return varlen_attn(*args, **kwargs)

    mine = {"_TORCH_VARLEN_ATTN": attention, "_LEAN_VARLEN": True, "_varlen_can_use_cudnn": lambda *args: False}
    before = {name: getattr(dispatch, name, None) for name in mine}
    vars(dispatch).update(mine)
    return lambda: vars(dispatch).update(before)


def enable_packed_kernels(model: Any) -> None:
    """Unsloth's switches for packed rows on a GPU: no length limit of a single row, variable-length kernels."""
    from unsloth.utils import packing  # its modules are not made for a CPU-only import

    packing.mark_allow_overlength(model)
    packing._enable_hf_packed_attention()


def scope_packed_kernels(model: Any, trainer: Any) -> None:
    """FA3 or FA4 inside of torch, where they are installed, while this trainer trains on packed rows."""
    if torch.cuda.is_available():
        from unsloth.utils.packing import enable_sample_packing

        enable_sample_packing(model, trainer)


def patched_layers(model: Any) -> int:
    """How many decoder layers run Unsloth's code: its attention forward or its fused LoRA projections (live model)."""
    return sum(_is_patched(layer) for layer in decoder_layers(model))


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a (PEFT-wrapped) causal language model."""
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "layers"]
    return list(found[0]) if found else []


def _is_patched(layer: Any) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    functions = [getattr(attention, name, None) for name in ("forward", "apply_qkv", "apply_o")]
    functions.append(getattr(mlp, "forward", None))
    modules = [getattr(getattr(function, "__func__", function), "__module__", None) or "" for function in functions]
    return any(name.startswith(("unsloth.", "unsloth_compiled_module")) for name in modules)


def _unsloth_checkpointing(policy: str) -> bool | str:
    return "unsloth" if policy == "unsloth" else policy == "full"


def trained_gib(model: Any) -> float:
    """Size of what will be saved: the trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**30
