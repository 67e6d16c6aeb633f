"""The arms: what each is, and its trainer. Heavy imports wait for the arm that asks for them, because unsloth patches
transformers, trl and peft for the whole process, and a plain arm must not have it.

All start from the same weights and adapter, see the same rows in the same order, and train with the same settings.
"""

# isort: skip_file
import contextlib
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fasttune.config import Config
from fasttune.core import autoconfig
from fasttune.core.memory import Choices
from fasttune.metrics import Backend

WHAT = {
    "fasttune": "what `fasttune train` does",
    "vanilla": "transformers.Trainer + PEFT as documented: padded rows, default attention and optimizer",
    "hf-tuned": "the same, tuned: fused AdamW; on a GPU Liger's kernels, and rows end to end if flash-attn is there; "
    "on a CPU rows end to end (DataCollatorWithFlattening) and huge pages",
    "unsloth-notebook": "Unsloth as its examples use it: SFTTrainer, its own batching and recomputation; xformers or "
    "flash-attn where installed, as it usually is",
}
PLAIN = ("vanilla", "hf-tuned")
ADAPTER, ROWS = "adapter.pt", "rows.json"  # in the shared folder


def build(arm: str, config: Config, steps: int, shared: Path, scratch: Path) -> Any:
    """The trainer of an arm, with the weights that all start from; `library` of it says what runs (not of `fasttune`).

    A transformers.Trainer with what_ran.Watched: worker.py adds a callback, wraps its collator and reads its losses.
    """
    if arm == "fasttune":
        job = prepare(config, scratch)
        from fasttune.core import trainer as trainers

        trainer = trainers.build(job, scratch)
    else:
        own: dict[str, Callable[..., Any]] = {
            "vanilla": partial(_plain, tuned=False),
            "hf-tuned": partial(_plain, tuned=True),
            "unsloth-notebook": _notebook,
        }
        trainer = own[arm](config, steps, shared, scratch)
        if Choices.of(config).stochastic_rounding:
            from fasttune.core import optimizers

            optimizers.round_by_chance(trainer)
    if config.train.method == "lora":
        _same_start(trainer.model, shared)
    return trainer


def prepare(config: Config, scratch: Path) -> Any:
    """The job as `fasttune train` prepares it."""
    from fasttune import terminal
    from fasttune.core import prepare
    from fasttune.system import library_log

    with library_log():
        return prepare.prepare(config, scratch / "run", terminal.Reporter(quiet=True))


def backend(arm: str, trainer: Any, layout: str) -> Backend:
    """What ran, read from the live model and trainer. `layout`: how the rows lay."""
    from fasttune.core import what_ran

    patched: dict[str, int] = {"patched_layers": 0}
    if arm not in PLAIN:
        from fasttune.core import model as models

        if arm == "fasttune":
            return what_ran.backend(trainer)
        patched = models.patched_layers(trainer.model)
    return Backend(
        library=trainer.library,
        attention=trainer.attention_seen or "not seen",
        packing=layout,
        **patched,
        gradient_checkpointing=trainer.recomputation_seen or "not seen",
        dtype=what_ran.dtypes(trainer.model, trainer.args.bf16),
        optimizer=what_ran.optimizer(trainer.optimizer),
    )


def _notebook(config: Config, steps: int, shared: Path, scratch: Path) -> Any:
    with contextlib.suppress(Exception):  # missing or broken: without it, as Unsloth does
        import xformers  # noqa: F401  core.model hides it from Unsloth unless it is there already
    from fasttune.core import model as models, what_ran
    import trl
    from datasets import Dataset

    full = config.train.method == "full"
    masters = Choices.of(config).fp32_masters
    model, tokenizer = models.load(config.model, config.model.dtype, "unsloth", full, config.seed, masters)
    if not full:
        model = models.add_lora(model, config.lora, "unsloth", config.seed)
    arguments = trl.SFTConfig(
        **_arguments(config, steps, scratch),
        gradient_checkpointing=True,
        optim=config.train.optimizer,
        max_length=config.model.max_length,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
    )
    data = Dataset.from_list(_rows(shared))
    data._unsloth_truncated_to = config.model.max_length  # else Unsloth turns padding-free batching off on a GPU

    class Trainer(what_ran.Watched, trl.SFTTrainer): ...

    trainer = Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.library = unsloth_library(models.attention_packages())
    return trainer


def unsloth_library(attention: list[str] | None) -> str:
    """What the notebook arm runs on, and which attention packages of a usual install it lacks (None: it is a CPU)."""
    if attention == []:
        return "unsloth + trl, without xformers or flash-attn, which a usual Unsloth install has"
    return "unsloth (CPU backend) + trl" if attention is None else " + ".join(["unsloth", "trl", *attention])


def _plain(config: Config, steps: int, shared: Path, scratch: Path, tuned: bool) -> Any:
    """transformers.Trainer and PEFT, without Unsloth."""
    from fasttune import cpu

    if tuned:
        cpu.ask_for_huge_pages()  # torch reads it once, at its import
    import torch
    import transformers

    from fasttune.core import what_ran

    on_gpu = torch.cuda.is_available()
    if tuned and not on_gpu:
        cpu.keep_freed_memory()
    used = {name: tuned and on_gpu and importlib.util.find_spec(name) for name in ("flash_attn", "liger_kernel")}
    arguments = _arguments(config, steps, scratch)
    if tuned:
        arguments |= {"optim": "adamw_torch_fused", "use_liger_kernel": bool(used["liger_kernel"])}
    attention = {"attn_implementation": "flash_attention_2"} if used["flash_attn"] else {}
    model, tokenizer = _plain_model(config, **attention)
    collator: Any = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    if used["flash_attn"] or (tuned and not on_gpu):  # else SDPA would be given a mask of the whole pack's square
        collator = transformers.DataCollatorWithFlattening()

    class Trainer(what_ran.Watched, transformers.Trainer): ...

    told = transformers.TrainingArguments(**arguments)
    trainer = Trainer(model=model, args=told, train_dataset=_rows(shared), data_collator=collator)
    trainer.remove_callback(transformers.PrinterCallback)
    libraries = {"peft": hasattr(model, "peft_config"), "liger": told.use_liger_kernel}
    trainer.library = " + ".join(["transformers", *(name for name, there in libraries.items() if there)])
    return trainer


def _plain_model(config: Config, **more: Any) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch
    import transformers

    from fasttune.core import pretrained

    source = pretrained.locate(config.model)
    same = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **same)
    dtype = getattr(torch, config.model.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **same, **more)
    if Choices.of(config).fp32_masters:
        model = model.float()  # from what `fasttune` holds in fp32, too; the arithmetic is autocast's
    return plain_lora(model, config) if config.train.method == "lora" else model, tokenizer


def plain_lora(model: Any, config: Config) -> Any:
    import peft

    lora = config.lora
    size = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": lora.dropout}
    return peft.get_peft_model(model, peft.LoraConfig(**size, target_modules=lora.targets, task_type="CAUSAL_LM"))


def _arguments(config: Config, steps: int, scratch: Path) -> dict[str, Any]:
    """What the trainers of the other arms are told: the job's own settings, and rows as they come."""
    import torch

    at_once = rows_at_once(config)
    return autoconfig.trainer_settings(config, steps) | {
        "output_dir": str(scratch / "trainer"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": config.train.batch_rows // at_once,
        "use_cpu": not torch.cuda.is_available(),
    }


def rows_at_once(config: Config) -> int:
    """Of the plain arms and the notebook, whose micro-batches are rows as they come."""
    return config.train.batch_rows if config.train.micro_batch_rows == "auto" else config.train.micro_batch_rows


def _rows(shared: Path) -> list[dict[str, list[int]]]:
    import numpy as np

    from fasttune.data.tokenize import labels

    return [
        {"input_ids": ids, "labels": labels(np.array(ids), np.array(supervised)).tolist()}
        for step in json.loads((shared / ROWS).read_text(encoding="utf-8"))
        for ids, supervised in step
    ]


def _same_start(model: Any, shared: Path) -> None:
    """Give the model the adapter that all arms start from; every trained parameter must be in it."""
    import torch

    start = torch.load(shared / ADAPTER, weights_only=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(start) == set(trained), "an arm trains other parameters than the others"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
