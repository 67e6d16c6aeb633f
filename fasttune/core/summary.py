"""What ran and what it cost: every number of run.json, from measured steps and live objects, never from the request."""

import shlex
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fasttune import hardware, metrics, system
from fasttune.config import TRUST
from fasttune.core import precision, shape
from fasttune.core.checkpoint import Checkpoint
from fasttune.core.prepare import Job
from fasttune.metrics import RunResult, Status, StepMetrics

MATMUL_SECONDS = 1.0  # spent after the run on measuring this machine's matmul rate


@dataclass
class Outcome:
    """How the training itself ended."""

    status: Status = "running"
    error: str | None = None
    steps: list[StepMetrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    resumed_from_step: int | None = None
    earlier_s: float = 0.0  # what the run had taken up to the checkpoint it goes on from
    checkpoint: Path | None = None  # the last good one
    held_out: dict[str, Any] = field(default_factory=dict)  # what the checkpoint knows of it
    saved_step: int | None = None  # whose weights are saved

    @property
    def done(self) -> int:
        """Steps that are behind the run."""
        return self.steps[-1].step if self.steps else self.resumed_from_step or 0

    @property
    def kept(self) -> str:
        """What is left to go on from, for a message."""
        return f"{self.checkpoint.name} is the last good checkpoint" if self.checkpoint else "there is no checkpoint"

    def go_on(self, found: Checkpoint, steps: list[StepMetrics]) -> None:
        """From a checkpoint, with the steps that lie before it."""
        self.steps, self.checkpoint = steps, found.path
        self.resumed_from_step, self.earlier_s = found.state["step"], found.state["wall_s"]
        self.held_out = found.state.get("held_out", {})


def broken_promises(job: Job, trainer: Any, ran: metrics.Backend) -> list[str]:
    """What was asked for and is not what runs: a setting is never ignored in silence."""
    found = []
    optimizer = getattr(trainer.args.optim, "value", trainer.args.optim)
    by_chance = precision.by_chance(job.config.train.method, job.plan.dtype, job.plan.optimizer)
    if optimizer != (precision.BY_CHANCE if by_chance else job.plan.optimizer):
        found.append(f"train.optimizer={job.plan.optimizer} was replaced: {optimizer} runs on this machine")
    if ran.gradient_checkpointing != job.plan.gradient_checkpointing:
        asked = job.plan.gradient_checkpointing
        found.append(f"train.gradient_checkpointing={asked} was replaced: {ran.gradient_checkpointing} runs")
    if job.plan.dtype == "bfloat16" and not trainer.args.bf16 and not job.machine.gpus:
        found.append("model.dtype=bfloat16: this CPU has no native bf16, so it is emulated and slow; set float32")
    if job.machine.gpus:
        lora = job.config.train.method == "lora"
        projections = [target for target in job.config.lora.targets if lora and target not in shape.MLP]
        counts = {"attention": ran.patched_layers}
        counts |= {"MLP": ran.patched_mlps} if lora and set(shape.MLP) & set(job.config.lora.targets) else {}
        counts |= {"LoRA of attention": ran.fused_lora_layers} if projections else {}
        layers = job.plan.shape.layers
        if slow := [f"{name} of {count}" for name, count in counts.items() if count < layers]:
            found.append(f"Unsloth runs {', '.join(slow)} of {layers} layers: the rest is plain transformers and PEFT")
    return found


def summarize(job: Job, outcome: Outcome, trainer: Any, started: float) -> RunResult:
    """Every number of run.json, from the steps that were measured and the objects that ran."""
    from fasttune.core import what_ran
    from fasttune.core.trainer import backend

    steps, steady = outcome.steps, metrics.steady(outcome.steps)
    tokens_seen = sum(step.tokens for step in steps)
    padding = sum(step.padding_tokens for step in steps)
    speed = metrics.median_rate(steps)
    achieved = matmul = None
    flops = what_ran.count_flops(job.model) if steady and outcome.status != "running" else None
    if flops is not None:
        rows = job.config.train.batch_rows
        computed = ((step.tokens - step.shared_tokens, step) for step in steady)
        achieved = statistics.median(flops.of_step(n, s.loss_tokens, rows) / s.seconds for n, s in computed) / 1e12
        matmul = measured_matmul_tflops(job)
    peak = hardware.peak_bf16_tflops(job.machine.gpus[0].name) if job.machine.gpus else None
    price = job.usd_per_hour
    outside = trainer.peak_outside_gib  # None on a CPU, where a peak is that of the whole process
    may_go_on = outcome.status != "completed" and outcome.checkpoint is not None
    result = RunResult(
        status=outcome.status,
        name=job.config.name,
        output_dir=str(job.folder),
        steps=outcome.done,
        first_loss=steps[0].loss if steps and steps[0].step == 1 else None,
        last_loss=steps[-1].loss if steps else None,
        tokens=tokens_seen,
        loss_tokens=sum(step.loss_tokens for step in steps),
        padding_fraction=padding / max(tokens_seen + padding, 1),
        tokens_per_s=speed,
        loss_tokens_per_s=metrics.median_rate(steps, "loss_tokens"),
        steady_steps=len(steady),
        seconds_to_first_step=trainer.first_step_done - started if trainer.first_step_done else None,
        wall_s=0.0,  # both: set_cost
        peak_memory_gib=max(s.peak_memory_gib for s in steps) if steps and outside else what_ran.peak_memory_gib(),
        mfu=achieved / peak if achieved and peak and job.plan.dtype == "bfloat16" else None,
        fraction_of_measured_matmul=achieved / matmul if achieved and matmul else None,
        measured_matmul_tflops=matmul,
        flops_formula=metrics.FLOPS_FORMULA,
        cost_usd=None,
        usd_per_hour=price,
        usd_per_million_tokens=price / 3600 / speed * 1e6 if price is not None and speed else None,
        backend=backend(trainer),
        versions=system.versions(),
        hardware=asdict(job.machine),
        settings=job.settings,
        forecast=job.forecast,
        warnings=outcome.warnings,
        error=outcome.error,
        resumed_from_step=outcome.resumed_from_step,
        peak_outside_steps_gib=outside,
        resume_command=resume_command(job) if outcome.status == "running" or may_go_on else None,
    )
    set_cost(result, outcome, started)
    return result


def set_cost(result: RunResult, outcome: Outcome, started: float) -> None:
    """Seconds and dollars of the whole run up to now, with what it had taken before it was resumed."""
    result.wall_s = outcome.earlier_s + time.perf_counter() - started
    if result.usd_per_hour is not None:
        result.cost_usd = result.usd_per_hour * result.wall_s / 3600


def resume_command(job: Job) -> str:
    command = ["fasttune", "train", str(job.folder / "config.yaml"), "--resume", str(job.folder)]
    return shlex.join([*command, *([f"{TRUST}=true"] if job.config.model.trust_remote_code else [])])


def measured_matmul_tflops(job: Job) -> float:
    """This machine's matmul rate at the run's own shape: tokens of a micro-batch of step 1 × hidden × MLP width."""
    batches = job.data.micro_batches(0)
    tokens = sum(batch["input_ids"].size for batch in batches) // len(batches)
    shape = (tokens, job.plan.shape.hidden, job.plan.shape.mlp)
    device = "cuda" if job.machine.gpus else "cpu"
    return hardware.measure_matmul_tflops(device, job.plan.dtype, [shape], MATMUL_SECONDS)[shape]
