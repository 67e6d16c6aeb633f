"""TRL's SFTTrainer (as Unsloth patched it) with a stopwatch and counters: what a step really cost and what really ran.

Shapes: B rows of a micro-batch, T tokens of the longest row (or of the whole packed row).
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttune import model as fasttune_model  # first: it imports unsloth, which patches transformers and trl

import torch
import transformers
import trl
from datasets import Dataset

from fasttune.data.tokens import IGNORE
from fasttune.metrics import Backend, StepMetrics
from fasttune.prepare import Job
from fasttune.quiet import native_stderr_closed

ATTENTION_OPERATORS = ("scaled_dot_product", "fmha", "flash_attn", "flash_fwd", "varlen_attn", "cudnn_attention")


class MeasuredTrainer(trl.SFTTrainer):
    """Counts tokens in the very tensors that are trained on, and profiles the first micro-batch for its attention."""

    counts: dict[str, int]
    attention_seen: str | None = None
    started: float = 0.0  # of the present step
    first_step_done: float = 0.0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """All micro-batches of one optimizer step; the step's clock starts before they are fetched."""
        synchronize()
        self.started = time.perf_counter()
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.counts = count_tokens(samples)
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.attention_seen is not None:
            return super().training_step(*args, **kwargs)
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with native_stderr_closed():  # torch 2.13's profiler prints its start and stop
            profile.start()
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            with native_stderr_closed():
                profile.stop()
        self.attention_seen = attention_operator({event.key for event in profile.key_averages()})
        return loss


class StepRecorder(transformers.TrainerCallback):
    """Turns the trainer's events into StepMetrics, and a signal into an orderly end after the current step."""

    def __init__(self, trainer: MeasuredTrainer, on_step: Callable[[StepMetrics], None]):
        self.trainer = trainer
        self.on_step = on_step
        self.seconds = 0.0
        self.stopped_by: signal.Signals | None = None

    def stop(self, number: int, _frame: Any) -> None:
        """Signal handler: the first one ends the run after this step, a second one at once."""
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds = now - self.trainer.started
        self.trainer.first_step_done = self.trainer.first_step_done or now
        if self.stopped_by is not None:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        counts = self.trainer.counts
        self.on_step(
            StepMetrics(
                step=state.global_step,
                loss=float(logs["loss"]),
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]) if logs.get("grad_norm") is not None else None,
                seconds=self.seconds,
                tokens_per_s=counts["tokens"] / self.seconds,
                peak_memory_gib=peak_memory_gib(),
                **counts,
            )
        )


def build(job: Job, scratch: Path) -> MeasuredTrainer:
    """The trainer of a prepared job. `scratch` is where TRL may write; nothing is saved by it."""
    config, plan, train = job.config, job.plan, job.config.train
    arguments = trl.SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=plan.micro_batch_rows,
        gradient_accumulation_steps=train.batch_rows // plan.micro_batch_rows,
        max_steps=job.total_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=round(train.warmup_ratio * job.total_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=plan.optimizer,
        bf16=plan.dtype == "bfloat16",
        gradient_checkpointing=plan.gradient_checkpointing != "none",
        max_length=config.model.max_length,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    rows = Dataset.from_dict({"input_ids": job.data.input_ids, "labels": job.data.labels})
    trainer = MeasuredTrainer(model=job.model, args=arguments, train_dataset=rows, processing_class=job.tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def backend(trainer: MeasuredTrainer) -> Backend:
    """What ran, from the live model and trainer."""
    model = trainer.model
    collator = trainer.data_collator
    weights = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    dtypes = [f"{_names(trained)} trained"] + ([f"{_names(weights)} frozen"] if weights else [])
    autocast = "bf16 autocast" if trainer.args.bf16 else "no autocast"
    padding_free = bool(getattr(collator, "padding_free", False)) or getattr(trainer.args, "packing", False)
    return Backend(
        library="unsloth + trl" if torch.cuda.is_available() else "unsloth (CPU backend) + trl",
        attention=trainer.attention_seen or "not seen",
        packing="padding-free" if padding_free else "padded",
        patched_layers=fasttune_model.patched_layers(model),
        gradient_checkpointing=fasttune_model.checkpointing(model),
        dtype=f"{', '.join(dtypes)}, {autocast}",
    )


def count_tokens(batches: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """Tokens, trained tokens and padding of the micro-batches of a step. input_ids, labels: (B, T).

    Without an attention mask nothing is padded. The first label of a row is never a target (causal shift).
    """
    tokens = sum(
        int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        for batch in batches
    )
    cells = sum(batch["input_ids"].numel() for batch in batches)
    loss_tokens = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    return {"tokens": tokens, "loss_tokens": loss_tokens, "padding_tokens": cells - tokens}


def attention_operator(names: set[str]) -> str:
    """The innermost attention operators among profiled names, e.g. aten::_flash_attention_forward."""
    found = sorted(
        name for name in names if any(part in name for part in ATTENTION_OPERATORS) and not name.endswith("_backward")
    )
    inner = [name for name in found if name != "aten::scaled_dot_product_attention" and "Backward" not in name]
    return ", ".join(inner or found) or "no fused attention operator"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak of the GPU's allocated memory, or of this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _names(dtypes: set[torch.dtype]) -> str:
    return "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
