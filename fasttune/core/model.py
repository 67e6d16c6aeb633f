"""The only door to Unsloth: load a model, put an adapter on it, read back what really runs.

Importing this module imports unsloth, and unsloth must come before transformers, trl and peft, because it patches
them at import. So this is the one file that imports it, and everything that trains imports this file first. It is also
the one file that touches private names of libraries (tests/test_model.py fails when one of them moves).
"""

# isort: skip_file
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fasttune import system, cpu
from fasttune.settings import RESIDUAL, LoraConfig, ModelConfig
from fasttune.core import pretrained
from fasttune.data import sandbox
from fasttune.errors import ModelError

# Before the import: no usage statistics, no telemetry, no unsloth_compiled_cache/ in the current folder.
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(system.cache_root() / "unsloth_compiled_cache"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns at every later fork
cpu.ask_for_huge_pages()
# Unsloth prefers xformers until torch 2.12, copies keys and values for every query head for it, and never asks again.
sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's registrations warn at every import

with system.no_collections():
    from unsloth import FastLanguageModel, tokenizer_utils
    import torch
    import transformers

transformers.utils.logging.disable_progress_bar()
# A chat template is a stranger's program: bounded wherever it runs, and as `fasttune data` shows it, never repaired.
transformers.utils.chat_template_utils._compile_jinja_template = sandbox.Bounded
tokenizer_utils.fix_chat_template = lambda tokenizer: tokenizer.chat_template
UNSLOTH = ("unsloth.", "unsloth_compiled_module")  # modules that its code is in
SOFTCAP = "attn_logit_softcapping"  # a cap of attention scores (Gemma 2), which SDPA leaves out without a word


def load(
    config: ModelConfig, dtype: str, gradient_checkpointing: str, full: bool, seed: int, masters: bool = False
) -> tuple[Any, Any]:
    """Weights and tokenizer through Unsloth, in `dtype` (bfloat16 | float32); nothing swapped or quantized unasked.

    masters: the weights of a model that computes in `dtype` are held in fp32.
    """
    source = pretrained.locate(config)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu.keep_freed_memory()
    with pretrained.explained(config.name):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=source,
            max_seq_length=config.max_length,
            dtype=getattr(torch, dtype),
            load_in_4bit=config.quantization == "nf4",
            full_finetuning=full,
            **({"float32_mixed_precision": True} if masters and on_gpu else {}),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_gradient_checkpointing=_unsloth_checkpointing(gradient_checkpointing),
            use_exact_model_name=True,
            use_safetensors=True,  # a pickle may run code
            random_state=seed,
        )
        tokenizer("x")  # some are read and break at the first text
    if config.added_tokens:
        from fasttune.core import embeddings

        embeddings.add_tokens(model, tokenizer, config)
    quantized = bool(getattr(model, "is_loaded_in_4bit", False))
    if quantized != (config.quantization == "nf4"):
        raise ModelError(
            f"model.quantization: asked for {config.quantization}, but the loaded weights are "
            f"{'4-bit' if quantized else 'not quantized'} on this machine; set it to {'nf4' if quantized else 'none'}"
        )
    if masters and not on_gpu:  # as Unsloth does on a GPU
        model = model.float()
        model._unsloth_original_dtype = getattr(torch, dtype)
    if not on_gpu and getattr(model.config.get_text_config(), SOFTCAP, None):
        set_attention(model, "eager")
    tokenizer.padding_side = "right"
    return model, tokenizer


def add_lora(model: Any, config: LoraConfig, gradient_checkpointing: str, seed: int, start: Path | None = None) -> Any:
    """A PEFT model with one trainable adapter. Raises ModelError if a target names no layer of this model.

    start: the adapter that the base weights were split by (RESIDUAL); computed again, it would differ by machine.
    """
    named = model.named_modules()
    layers = {module: name.rsplit(".", 1)[-1] for name, module in named if isinstance(module, torch.nn.Linear)}
    if missing := [target for target in config.targets if target not in layers.values()]:
        layers.pop(model.get_output_embeddings(), None)  # which can have one, but hardly ever should
        has = f"it has {', '.join(sorted({*layers.values()}))}: set lora.targets to some of these"
        raise ModelError(f"lora.targets: this model has no {', '.join(missing)}; {has}")
    get_peft_model = FastLanguageModel.get_peft_model
    if config.train_embeddings:
        from fasttune.core import embeddings

        get_peft_model = embeddings.trained_too(get_peft_model)
    model = get_peft_model(
        model,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        use_rslora=config.rslora,
        init_lora_weights=True if config.init == "default" or start is not None else config.init,
        use_gradient_checkpointing=_unsloth_checkpointing(gradient_checkpointing),
        random_state=seed,
    )
    if config.init in RESIDUAL and start is not None:
        from fasttune.core import residual

        residual.split_again(model, start, config.init)
    return model


def save(
    model: Any, tokenizer: Any, folder: Path, initial_adapter: Path | None = None, dtype: str | None = None
) -> None:
    """Adapter (PEFT format) or full weights as safetensors with the tokenizer; the folder appears only when complete.

    dtype: that of full weights, which training may have held in fp32.

    `initial_adapter` is what `save_initial` returned: with it a RESIDUAL adapter, which only fits the weights it was
    split from, is written as an ordinary LoRA adapter of twice the rank that fits the original model.
    Source: https://huggingface.co/docs/peft/developer_guides/lora#pissa
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as temp:
        made = Path(temp) / "made"
        extra: Any = {"path_initial_model_for_weight_conversion": str(initial_adapter)} if initial_adapter else {}
        if any("modules_to_save" in name for name, _ in model.named_parameters()):  # they are saved in any case
            extra["save_embedding_layers"] = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* changes the base weights")  # the conversion undoes just that
            model.save_pretrained(made, **extra, **({"state_dict": _weights_in(model, dtype)} if dtype else {}))
        if dtype:
            settings = json.loads((made / "config.json").read_text(encoding="utf-8"))
            settings |= {"dtype": dtype, "use_cache": True}  # which training has turned off; generating needs it
            (made / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in ("README.md", "unsloth_lora_init.json"):  # PEFT's empty card; Unsloth's mark, wrong once converted
            (made / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(made)
        system.make_readable(made)
        if folder.exists():  # of the same run, before it was resumed
            folder.rename(Path(temp) / "old")
        made.rename(folder)


def _weights_in(model: Any, dtype: str) -> dict[str, torch.Tensor]:
    """The weights on the host, in `dtype`. What is tied stays one tensor, which is saved once."""
    made: dict[int, torch.Tensor] = {}
    for tensor in (tensors := model.state_dict()).values():
        if tensor.is_floating_point():
            made.setdefault(tensor.data_ptr(), tensor.to("cpu", getattr(torch, dtype)))
    return {name: made.get(tensor.data_ptr(), tensor) for name, tensor in tensors.items()}


def save_initial(model: Any, config: LoraConfig, folder: Path) -> Path | None:
    """Keep a RESIDUAL adapter's start for `save`; None for any other one, which needs none."""
    if config.init not in RESIDUAL:
        return None
    model.save_pretrained(folder)
    return folder


def computes_in(model: Any) -> torch.dtype:
    """The dtype that the packs of a model are proved in: of its weights, or what Unsloth holds in fp32 for training."""
    return getattr(model, "_unsloth_original_dtype", None) or next(model.parameters()).dtype


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


def take_shared_attention(now: Any) -> Callable[[], None]:
    """Let Unsloth run the packs of core/shared_attention.py `Now` through it; returns what undoes it.

    Source: unsloth/utils/attention_dispatch.py (2026.10.9): of a pack without a mask it asks whether torch's
    variable-length kernel is the fastest, and if so calls it through one function.
    """
    from unsloth.utils import attention_dispatch as dispatch

    call, is_fastest = dispatch._varlen_attn_call, dispatch._torch_varlen_beats_segments

    def attention(query: Any, key: Any, value: Any, *args: Any, scale: Any, window_size: Any, **kwargs: Any) -> Any:
        if now.pack is None:
            return call(query, key, value, *args, scale=scale, window_size=window_size, **kwargs)
        return now.attention(query, key, value, scale, tuple(window_size))

    dispatch._varlen_attn_call = attention
    dispatch._torch_varlen_beats_segments = lambda *args: now.pack is not None or is_fastest(*args)
    return lambda: vars(dispatch).update(_varlen_attn_call=call, _torch_varlen_beats_segments=is_fastest)


def attention_packages() -> list[str] | None:
    """Which of xformers and flash-attn Unsloth may take in this process; None where it runs on a CPU."""
    if not torch.cuda.is_available():
        return None
    from unsloth.utils import attention_dispatch as dispatch

    found = {"xformers": dispatch.HAS_XFORMERS, "flash-attn": dispatch.HAS_FLASH_ATTENTION}
    return [name for name, there in found.items() if there]


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


def set_attention(model: Any, name: str) -> str:
    """Let transformers' layers call this attention function from now on; returns the name of the one before."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, name
    return before


def loading_in_parts() -> AbstractContextManager[Any]:
    """Meanwhile `load` reads the part of the weights that this process holds (core/sharded.py)."""
    from unsloth.models import fsdp2_load

    return fsdp2_load.fsdp2_sharded_loading()


def divided(model: Any) -> Any:
    """A model of which each process holds a part, whatever Unsloth thinks would fit: nothing frozen is held whole."""
    from unsloth.models import fsdp2_native as native

    layout = native.FSDP2Config(fit_layout=False, shard_frozen=True, reshard_after_forward=True)
    return native.shard_model(model, layout)


def gathered(model: Any, trained_only: bool) -> AbstractContextManager[Any]:
    """Meanwhile a divided model is whole on rank 0."""
    from unsloth.models import fsdp2_save

    return fsdp2_save.fsdp2_gathered(model, trainable_only=trained_only)


def begin_after(trainer: Any, state: Any, step: int) -> None:
    """Let a trainer whose run begins count from `step` on, as if it had done and logged that many."""
    state.global_step = trainer._globalstep_last_logged = step


def patched_layers(model: Any) -> dict[str, int]:
    """How many decoder layers run Unsloth's attention, its MLP, and its fused LoRA around attention (live model).

    Apart, since each can be missing alone: with an fp32 base attention is Unsloth's, and LoRA is PEFT's.
    """
    seen = {"patched_layers": 0, "patched_mlps": 0, "fused_lora_layers": 0}
    for layer in decoder_layers(model):
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        projections = [_module(attention, name) for name in ("apply_qkv", "apply_o")]
        seen["patched_layers"] += _module(attention, "forward").startswith(UNSLOTH)
        seen["patched_mlps"] += _module(mlp, "forward").startswith(UNSLOTH)
        seen["fused_lora_layers"] += all(name == "unsloth.kernels.fast_lora" for name in projections)
    return seen


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a (PEFT-wrapped) causal language model."""
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "layers"]
    return list(found[0]) if found else []


def _module(owner: Any, function: str) -> str:
    """Where a function or method of `owner` was written."""
    found = getattr(owner, function, None)
    return getattr(getattr(found, "__func__", found), "__module__", None) or ""


def _unsloth_checkpointing(policy: str) -> bool | str:
    return "unsloth" if policy == "unsloth" else policy == "full"


def trained_gib(model: Any) -> float:
    """Size of what will be saved: the trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**30
