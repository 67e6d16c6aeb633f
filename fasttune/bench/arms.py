"""The arms: what each is, and how it runs one repeat in its own process. Nothing is imported before an arm asks for it,
because unsloth patches transformers, trl and peft for the whole process.

All start from the same weights and adapter, see the same rows in the same order, and learn with the same settings.
"""

# isort: skip_file
import contextlib
import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasttune import config as configuration
from fasttune.core import precision
from fasttune.bench.result import Repeat
from fasttune.config import Config

PROCESS_STARTED = time.perf_counter()
WHAT = {
    "fasttune": "what `fasttune train` does",
    "vanilla": "transformers.Trainer + PEFT as documented: padded rows, default attention and optimizer",
    "hf-tuned": "the same, tuned: fused AdamW; on a GPU Liger's kernels, and rows end to end if flash-attn is there; "
    "on a CPU rows end to end (DataCollatorWithFlattening) and huge pages",
    "unsloth-notebook": "Unsloth as its examples use it: SFTTrainer, its own batching and recomputation; xformers or "
    "flash-attn where installed, as it usually is",
}
PLAIN = ("vanilla", "hf-tuned")
ADAPTER = "adapter.pt"


def run(arm: str, config: Config, steps: int, shared: Path, scratch: Path) -> Repeat:
    """One repeat of an arm. `shared` holds what `share` wrote. An arm that runs out of memory begins anew with half as
    many rows at once; `fasttune` does so by itself."""
    import gc

    asked = micro(config)[0]
    while True:
        at_once = micro(config)[0]
        try:
            found = _once(arm, config, steps, shared, scratch)
            packing = f"{found.backend.packing}, {at_once} at once: {asked} ran out of memory"
            return found if at_once == asked else replace(found, backend=replace(found.backend, packing=packing))
        except RuntimeError as error:
            import torch  # not before: what an arm asks of the memory must be set by then

            if not isinstance(error, torch.OutOfMemoryError) or arm == "fasttune" or at_once == 1:
                raise
        gc.collect()  # outside of `except`, whose traceback holds the model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        fewer = max(n for n in range(1, at_once) if config.train.batch_rows % n == 0)
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_rows": fewer})})


def _once(arm: str, config: Config, steps: int, shared: Path, scratch: Path) -> Repeat:
    if arm == "fasttune":
        return _fasttune(config, shared, scratch)
    if arm == "unsloth-notebook":
        return _notebook(config, steps, shared, scratch)
    return _hugging_face(config, steps, shared, scratch, tuned=arm == "hf-tuned")


def share(config: Config, shared: Path, scratch: Path) -> dict[str, Any]:
    """Write what all arms start from: the adapter, and every step's rows. Returns facts of the job for the report."""
    import json

    job = _prepare(config, scratch)
    import torch

    if config.train.method == "lora":
        torch.save({n: p.detach().cpu() for n, p in job.model.named_parameters() if p.requires_grad}, shared / ADAPTER)
    rows = [[job.data.parts[p].row(r) for p, r in job.data.rows_of(step)] for step in range(job.total_steps)]
    plain = [[(ids.tolist(), learned.tolist()) for ids, learned in step] for step in rows]
    (shared / "rows.json").write_text(json.dumps(plain), encoding="utf-8")
    (shared / "config.yaml").write_text(configuration.dump(job.config), encoding="utf-8")
    data = job.data
    mean_tokens = sum(part.counts["tokens"] for part in data.parts) / sum(map(len, data.parts))
    return {
        "tokens_per_epoch": round(mean_tokens * data.rows_per_epoch),
        "steps_per_epoch": data.steps_per_epoch,
        "full_steps_per_epoch": data.rows_per_epoch // data.batch_rows,
    }


def _prepare(config: Config, scratch: Path) -> Any:
    from fasttune import terminal
    from fasttune.core import prepare
    from fasttune.system import library_log

    with library_log():
        return prepare.prepare(config, scratch / "run", terminal.Reporter(quiet=True))


def _fasttune(config: Config, shared: Path, scratch: Path) -> Repeat:
    job = _prepare(config, scratch)
    from fasttune.core import trainer as trainers
    from fasttune.bench.clock import Clock, Counter, repeat

    if config.train.method == "lora":
        _same_start(job.model, shared)
    trainer = trainers.build(job, scratch)
    clock, counter = Clock(PROCESS_STARTED), Counter(trainer.data_collator, per_step=1)
    trainer.data_collator = counter
    trainer.add_callback(clock)
    trainer.train()
    return repeat(clock, counter, job.model, config.train.batch_rows, trainers.backend(trainer))


def _notebook(config: Config, steps: int, shared: Path, scratch: Path) -> Repeat:
    with contextlib.suppress(Exception):  # missing or broken: without it, as Unsloth does
        import xformers  # noqa: F401  fasttune.core.model hides it from Unsloth unless it is there already
    from fasttune.core import model as models
    import trl
    from datasets import Dataset

    from fasttune.core import what_ran
    from fasttune.bench.clock import Clock, Counter, repeat
    from fasttune.metrics import Backend

    full = config.train.method == "full"
    job = (config.train.method, config.model.dtype, config.train.optimizer)
    model, tokenizer = models.load(
        config.model, config.model.dtype, "unsloth", full, config.seed, precision.masters(*job)
    )
    if not full:
        model = models.add_lora(model, config.lora, "unsloth", config.seed)
        _same_start(model, shared)
    rows = _rows(shared)
    at_once, accumulation = micro(config)
    arguments = trl.SFTConfig(
        **_arguments(config, steps, scratch),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=True,
        optim=config.train.optimizer,
        max_length=config.model.max_length,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
    )
    data = Dataset.from_dict({key: [row[key] for row in rows] for key in ("input_ids", "labels")})
    data._unsloth_truncated_to = config.model.max_length  # else Unsloth turns padding-free batching off on a GPU

    class Trainer(what_ran.Watched, trl.SFTTrainer): ...

    trainer = Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    clock, counter = Clock(PROCESS_STARTED), Counter(trainer.data_collator, accumulation)
    trainer.data_collator = counter
    trainer.add_callback(clock)
    if precision.by_chance(*job):
        what_ran.round_by_chance(trainer)
    trainer.train()
    backend = Backend(
        library=_unsloth_library(models.attention_packages()),
        attention=trainer.attention_seen or "not seen",
        packing=counter.layout,
        **models.patched_layers(model),
        gradient_checkpointing=trainer.recomputation_seen or "not seen",
        dtype=what_ran.dtypes(model, trainer.args.bf16),
        optimizer=what_ran.optimizer(trainer.optimizer),
    )
    return repeat(clock, counter, model, config.train.batch_rows, backend)


def _unsloth_library(attention_packages: list[str] | None) -> str:
    """What the notebook arm runs on, and what it lacks of a usual install."""
    if attention_packages is None:
        return "unsloth (CPU backend) + trl"
    if not attention_packages:
        return "unsloth + trl, without xformers or flash-attn, which a usual Unsloth install has"
    return " + ".join(["unsloth", "trl", *attention_packages])


def _hugging_face(config: Config, steps: int, shared: Path, scratch: Path, tuned: bool) -> Repeat:
    from fasttune.cpu import memory

    if tuned:
        memory.ask_for_huge_pages()
    import torch
    import transformers

    if tuned and not torch.cuda.is_available():
        memory.keep_freed()

    from fasttune.core import pretrained
    from fasttune.core import what_ran
    from fasttune.bench.clock import Clock, Counter, repeat
    from fasttune.metrics import Backend

    source, on_gpu = pretrained.locate(config.model), torch.cuda.is_available()
    # Without it SDPA would be given a mask of the whole pack's square.
    flash = tuned and on_gpu and importlib.util.find_spec("flash_attn") is not None
    same: dict[str, Any] = {
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **same)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, config.model.dtype),
        use_safetensors=True,
        **same,
        **({"attn_implementation": "flash_attention_2"} if flash else {}),
    )
    job = (config.train.method, config.model.dtype, config.train.optimizer)
    if precision.masters(*job):
        model = model.float()  # from what `fasttune` holds in fp32, too; the arithmetic is autocast's
    if config.train.method == "lora":
        model = _plain_lora(model, config)
        _same_start(model, shared)
    at_once, accumulation = micro(config)
    liger = tuned and on_gpu and importlib.util.find_spec("liger_kernel") is not None
    arguments = transformers.TrainingArguments(
        **_arguments(config, steps, scratch),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        **({"optim": "adamw_torch_fused"} if tuned else {}),
        use_liger_kernel=liger,
    )
    padded = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    collator = transformers.DataCollatorWithFlattening() if tuned and (flash or not on_gpu) else padded
    counter, clock = Counter(collator, accumulation), Clock(PROCESS_STARTED)

    class Trainer(what_ran.Watched, transformers.Trainer): ...

    trainer = Trainer(
        model=model, args=arguments, train_dataset=_rows(shared), data_collator=counter, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if precision.by_chance(*job):
        what_ran.round_by_chance(trainer)
    trainer.train()
    backend = Backend(
        library="transformers" + (" + peft" if config.train.method == "lora" else "") + (" + liger" if liger else ""),
        attention=trainer.attention_seen or "not seen",
        packing=counter.layout,
        patched_layers=0,
        gradient_checkpointing=trainer.recomputation_seen or "not seen",
        dtype=what_ran.dtypes(model, trainer.args.bf16),
        optimizer=what_ran.optimizer(trainer.optimizer),
    )
    return repeat(clock, counter, model, config.train.batch_rows, backend)


def _plain_lora(model: Any, config: Config) -> Any:
    import peft

    lora = config.lora
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            use_rslora=lora.rslora,
            task_type="CAUSAL_LM",
        ),
    )


def _arguments(config: Config, steps: int, scratch: Path) -> dict[str, Any]:
    """What every Hugging Face trainer is told: the job's own settings."""
    import torch

    train = config.train
    return {
        "output_dir": str(scratch / "trainer"),
        "max_steps": steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": round(train.warmup_ratio * steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": config.model.dtype == "bfloat16",
        "seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def micro(config: Config) -> tuple[int, int]:
    """Rows at once and how often, for trainers that take so many rows at a time."""
    rows = config.train.batch_rows if config.train.micro_batch_rows == "auto" else config.train.micro_batch_rows
    return rows, config.train.batch_rows // rows


def _rows(shared: Path) -> list[dict[str, list[int]]]:
    import json

    import numpy as np

    from fasttune.data.tokenize import labels

    return [
        {"input_ids": ids, "labels": labels(np.array(ids), np.array(learned)).tolist()}
        for step in json.loads((shared / "rows.json").read_text(encoding="utf-8"))
        for ids, learned in step
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
