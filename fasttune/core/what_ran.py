"""What really runs, read from live objects: tokens of a batch, attention operators, dtypes, memory.

Needs torch only, so that arms without Unsloth are measured by the same code.
Shapes: B rows of a micro-batch, T tokens of the longest row (or of the whole packed row).
"""

import statistics
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint

from fasttune import hardware, metrics, system
from fasttune.core import run_folder
from fasttune.core.memory import MLP, STOCHASTIC_ADAMW, Shape
from fasttune.data import sharing
from fasttune.data.tokenize import IGNORE
from fasttune.hardware import Hardware
from fasttune.metrics import Backend, ExactMatch, Flops, RanksSeen, RunResult, Sample, Status, StepMetrics
from fasttune.system import native_stderr_closed

if TYPE_CHECKING:
    from fasttune.core.prepare import Job
    from fasttune.core.trainer import MeasuredTrainer, StepRecorder

PROBED = 256  # values of a parameter
USUAL_BETAS = (0.9, 0.999)
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}  # of torch's and torchao's AdamW, and of bitsandbytes'
ATTENTION_OPERATORS = (
    "scaled_dot_product",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fmha",
    "flash_attn",
    "flash_fwd",
    "varlen_attn",
    "RowsAttention",
    "SharedAttention",
)


class AttentionSeen:
    """Profiles what is done inside `with` for its attention: `names` of its operators join those seen before."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    @property
    def operators(self) -> str:
        """The innermost of them, e.g. aten::_flash_attention_forward."""
        inner = {name for name in self.names if name != "aten::scaled_dot_product_attention" and "Backward" not in name}
        return ", ".join(sorted(inner or self.names)) or "no fused attention operator"

    def __enter__(self) -> "AttentionSeen":
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with native_stderr_closed():  # torch 2.13's profiler prints its start and stop
            self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        with native_stderr_closed():
            self._profile.stop()
        events = self._profile.profiler.kineto_results.events()  # made into Python's, they are 9 MB a layer
        ran = {event.name() for event in events}
        self.names |= {
            name for name in ran if any(part in name for part in ATTENTION_OPERATORS) and not name.endswith("_backward")
        }
        del self._profile


class Watched:
    """Mixed in before any Hugging Face trainer: takes rows in their order, and looks at all of the first step: which
    attention ran, what was recomputed. Runs and all arms of a benchmark share it: what is timed is the same code.
    """

    seen: AttentionSeen | None = None
    step_seen: int | None = None
    recomputation_seen: str | None = None  # read while it runs: Unsloth's trainer clears the flags at its end
    state: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = super().training_step  # type: ignore[misc]
        if self.step_seen not in (None, self.state.global_step):
            return step(model, *args, **kwargs)
        self.seen, self.step_seen = self.seen or AttentionSeen(), self.state.global_step
        self.recomputation_seen = checkpointing(model)
        with self.seen:
            return step(model, *args, **kwargs)

    @property
    def attention_seen(self) -> str | None:
        """The innermost attention operators of the first step, e.g. aten::_flash_attention_forward."""
        return self.seen.operators if self.seen else None


def checkpointing(model: Any) -> str:
    """Which recomputation is live: none, full, or unsloth (activations offloaded to the host)."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "none"
    function = torch.utils.checkpoint.checkpoint
    return "unsloth" if (function.__module__ or "").startswith("unsloth") else "full"


def count_tokens(batches: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """Tokens, supervised tokens and padding of the micro-batches of a step; computed: each token once, padding not.

    input_ids, labels: (B, T). Without an attention mask nothing is padded. The first label of a sequence is never a
    target (causal shift). A beginning that rows share counts in `tokens` with every row, as it would in any layout.
    """
    cells = sum(batch["input_ids"].numel() for batch in batches)
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches if "attention_mask" in batch)
    loss_tokens = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    return {
        "tokens": cells - padding + sum(map(_again, batches)),
        "computed_tokens": cells - padding,
        "loss_tokens": loss_tokens,
        "padding_tokens": padding,
    }


def _again(batch: dict[str, torch.Tensor]) -> int:
    """Tokens that rows share with one before them, which has them computed."""
    if "row_ends" not in batch:
        return 0
    lengths = batch["packed_seq_lengths"].tolist()
    return sum(lengths[segment] for path in sharing.paths(batch) for segment in path) - sum(lengths)


def layout(batches: list[dict[str, torch.Tensor]], counts: dict[str, int]) -> str:
    """How the rows of the micro-batches of a step lie: "packed: 8 rows in 1 micro-batch". counts: of count_tokens."""
    form = "padded" if any("attention_mask" in batch for batch in batches) else "packed"
    rows, shared = sum(map(rows_of, batches)), counts["tokens"] - counts["computed_tokens"]
    parts = "1 micro-batch" if len(batches) == 1 else f"{len(batches)} micro-batches"
    text = f"{form}: {rows} {'row' if rows == 1 else 'rows'} in {parts}"
    return text + (f", {shared:,} tokens of shared beginnings not computed again" if shared else "")


def rows_of(batch: dict[str, torch.Tensor]) -> int:
    """How many rows a micro-batch holds (see data/batching.py)."""
    return len(next(batch[name] for name in ("row_ends", "packed_seq_lengths", "input_ids") if name in batch))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak of the GPU's allocated memory, or of this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Not ru_maxrss: a process inherits that of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


@contextmanager
def busy(machine: Hardware) -> Iterator[Callable[[], float | None]]:
    """Called afterwards: the mean share of a second in which the GPU ran kernels, as its driver says; None on a CPU."""
    found: list[float] = []
    if not machine.gpus:
        yield lambda: None
        return
    from fasttune import gpus

    with gpus.every_second(machine.gpus[0].card, ["utilization.gpu"]) as seen:
        yield lambda: statistics.mean(found) / 100 if found else None
        found += [percent for (text,) in seen() if (percent := gpus.number(text)) is not None]


def restart_peak() -> float | None:
    """The peak of a GPU's memory up to now; from here it is counted again. None on a CPU: that of the process stays."""
    if not torch.cuda.is_available():
        return None
    peak = peak_memory_gib()
    torch.cuda.reset_peak_memory_stats()
    return peak


def dtypes(model: Any, autocast: bool) -> str:
    """Dtypes of the live parameters, e.g. "float32 trained, bfloat16 frozen, bf16 autocast"."""
    weights = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    ends = [name for name, _ in model.named_parameters() if name.endswith(".modules_to_save.default.weight")]
    what = f" ({_adapter_and(model)})" if ends else ""
    found = [f"{_names(trained)} trained{what}"] + ([f"{_names(weights)} frozen"] if weights else [])
    return ", ".join([*found, "bf16 autocast" if autocast else "no autocast"])


def _adapter_and(model: Any) -> str:
    """What is trained where that is more than an adapter, e.g. "adapter, embeddings and head"."""
    inside, outside = (end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    trained = " and ".join(name for name, end in (("embeddings", inside), ("head", outside)) if end.requires_grad)
    return f"adapter, {trained}" + (", which are one tensor" if inside is outside else "")


def optimizer(live: Any) -> str:
    """What updates the weights and in what its moments are, e.g. "torch AdamW, moments float32"."""
    live = getattr(live, "optimizer", live)  # accelerate wraps it
    if live is None:
        return "not seen"
    values = [value for entries in live.state.values() for name, value in entries.items() if name in MOMENTS]
    parts = [value.to_local() if hasattr(value, "to_local") else value for value in values]  # of a divided model
    moments = {"8 bit" if hasattr(part, "__tensor_flatten__") else _names({part.dtype}) for part in parts}
    text = f"{type(live).__module__.partition('.')[0]} {type(live).__name__}, moments {'/'.join(sorted(moments))}"
    if (betas := tuple(map(float, live.param_groups[0].get("betas", USUAL_BETAS)))) != USUAL_BETAS:
        text += f", betas {betas[0]:g} and {betas[1]:g}"
    text += ", paged" if getattr(live, "is_paged", False) else ""
    return text + (", bf16 rounded by chance" if getattr(live, "bf16_stochastic_round", False) else "")


def fingerprint(parameters: Iterable[torch.Tensor], most: int | None = PROBED) -> str:
    """A checksum of the first `most` values of every parameter (None: of all), whatever their names, order and dtype.

    Packed 4-bit weights are bytes, so never the same as those that they stand for.
    """
    found = []
    for parameter in parameters:
        values = parameter.detach().flatten()[:most].float().cpu()
        found.append(f"{parameter.numel()} {zlib.crc32(values.numpy().tobytes()):08x}")
    return f"{zlib.crc32(' '.join(sorted(found)).encode()):08x}"


def count_flops(model: Any) -> Flops | None:
    """FLOPs per token of a training step of this live model (see metrics.count_flops), from its linear layers.

    None where they do not tell: quantized weights are packed, and transformers keeps experts as one tensor, no layers.
    """
    shape = Shape.of(getattr(model.config, "get_text_config", lambda: model.config)())
    head = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if module is not head]
    ends = (".original_module", ".modules_to_save.default")  # PEFT's, of a head that is trained beside an adapter
    linear = [module for name, module in modules if isinstance(module, torch.nn.Linear) and not name.endswith(ends)]
    if shape.experts > 1 or not all(module.weight.is_floating_point() for module in linear):
        return None
    return metrics.count_flops(
        linear_weights=sum(module.weight.numel() for module in linear),
        trained_weights=sum(module.weight.numel() for module in linear if module.weight.requires_grad),
        head_weights=head.weight.numel(),
        head_trained=head.weight.requires_grad,
        layers=shape.layers,
        attention_width=shape.query_width,
    )


def _names(dtypes: set[torch.dtype]) -> str:
    return "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def backend(trainer: "MeasuredTrainer") -> Backend:
    """What ran in a run of ours, from the live model and trainer."""
    from fasttune.core import model as models
    from fasttune.cpu import fused_lora

    model, library = trainer.model, "unsloth + trl"
    if not torch.cuda.is_available():
        fused = fused_lora.live_layers(model)
        library = "unsloth (CPU backend) + trl" + (f", LoRA fused in {fused} layers" if fused else "")
    return Backend(
        library=library,
        attention=trainer.attention_seen or "not seen",
        packing=f"{trainer.layout} (last step)",
        **models.patched_layers(model),
        gradient_checkpointing=trainer.recomputation_seen or "not seen",
        dtype=dtypes(model, trainer.args.bf16),
        optimizer=optimizer(trainer.optimizer),
    )


def broken_promises(job: "Job", trainer: "MeasuredTrainer") -> list[str]:
    """What was asked for and is not what runs: a setting is never ignored in silence."""
    found, ran = [], backend(trainer)
    plan, config = job.plan, job.config
    optimizer = getattr(trainer.args.optim, "value", trainer.args.optim)
    if optimizer != (STOCHASTIC_ADAMW if plan.stochastic_rounding else plan.optimizer):
        found.append(f"train.optimizer={plan.optimizer} was replaced: {optimizer} runs on this machine")
    if ran.gradient_checkpointing != plan.gradient_checkpointing:
        asked = f"train.gradient_checkpointing={plan.gradient_checkpointing}"
        found.append(f"{asked} was replaced: {ran.gradient_checkpointing} runs")
    if plan.dtype == "bfloat16" and not trainer.args.bf16 and not job.machine.gpus:
        found.append("model.dtype=bfloat16: this CPU has no native bf16, so it is emulated and slow; set float32")
    if job.machine.gpus:
        targets = set(config.lora.targets) if config.train.method == "lora" else set()
        counts = {"attention": ran.patched_layers}
        counts |= {"MLP": ran.patched_mlps} if targets & set(MLP) else {}
        counts |= {"LoRA of attention": ran.fused_lora_layers} if targets - set(MLP) else {}
        layers = plan.shape.layers
        if slow := [f"{name} of {count}" for name, count in counts.items() if count < layers]:
            found.append(f"Unsloth runs {', '.join(slow)} of {layers} layers: the rest is plain transformers and PEFT")
    return found


def achieved_tflops(job: "Job", steps: list[StepMetrics], seconds: float) -> tuple[float | None, float | None]:
    """(TFLOP/s of the model in the steady steps, TFLOP/s of matmuls of the run's own shape, measured now for so many
    seconds); None where nothing honest can be said.
    """
    steady, flops = metrics.steady(steps), count_flops(job.model)
    if not steady or flops is None:
        return None, None
    rows = job.config.train.batch_rows
    achieved = statistics.median(
        flops.of_step(step.computed_tokens, step.loss_tokens, step.tokens / rows) / step.seconds for step in steady
    )
    batches = job.data.micro_batches(0)
    tokens = sum(batch["input_ids"].size for batch in batches) // len(batches)  # × hidden × MLP width
    shape = (tokens, job.plan.shape.hidden, job.plan.shape.mlp)
    device = "cuda" if job.machine.gpus else "cpu"
    achieved /= job.ranks.size  # of one chip
    return achieved / 1e12, hardware.measure_matmul_tflops(device, job.plan.dtype, [shape], seconds)[shape]


def result_of(
    recorder: "StepRecorder",
    speed: tuple[float | None, float | None] = (None, None),
    samples: list[Sample] | None = None,
    exact_match: ExactMatch | None = None,
    status: Status | None = None,
) -> RunResult:
    """Every number of run.json, from the steps that were measured and the objects that ran.

    speed: achieved_tflops of these steps. status: in place of the journal's.
    """
    job, journal, trainer = recorder.job, recorder.journal, recorder.trainer
    steps, status = journal.steps, status or journal.status
    resumable = status == "running" or (status != "completed" and journal.checkpoint is not None)
    tokens, padding = (sum(getattr(step, name) for step in steps) for name in ("tokens", "padding_tokens"))
    tokens_per_s, price, wall_s = metrics.median_rate(steps), job.usd_per_hour, journal.wall_s
    achieved, matmul = speed
    peak = None
    if job.machine.gpus:
        from fasttune import chips

        peak = chips.peak_bf16_tflops(job.machine.gpus[0].name)
    outside = trainer.peak_outside_gib  # None on a CPU, where a peak is that of the whole process
    return RunResult(
        status=status,
        name=job.config.name,
        output_dir=str(job.folder),
        steps=journal.done,
        first_loss=steps[0].loss if steps and steps[0].step == 1 else None,
        last_loss=steps[-1].loss if steps else None,
        tokens=tokens,
        computed_tokens=sum(step.computed_tokens for step in steps),
        loss_tokens=sum(step.loss_tokens for step in steps),
        padding_fraction=padding / max(tokens + padding, 1),
        tokens_per_s=tokens_per_s,
        computed_tokens_per_s=metrics.median_rate(steps, "computed_tokens"),
        loss_tokens_per_s=metrics.median_rate(steps, "loss_tokens"),
        steady_steps=len(metrics.steady(steps)),
        seconds_to_first_step=trainer.first_step_done - journal.started if trainer.first_step_done else None,
        wall_s=wall_s,
        peak_memory_gib=max(s.peak_memory_gib for s in steps) if steps and outside else peak_memory_gib(),
        mfu=achieved / peak if achieved and peak and job.plan.dtype == "bfloat16" else None,
        fraction_of_measured_matmul=achieved / matmul if achieved and matmul else None,
        measured_matmul_tflops=matmul,
        flops_formula=metrics.FLOPS_FORMULA,
        cost_usd=None if price is None else price * wall_s / 3600,
        usd_per_hour=price,
        usd_per_million_tokens=price / 3600 / tokens_per_s * 1e6 if price is not None and tokens_per_s else None,
        backend=backend(trainer),
        versions=system.versions(),
        hardware=asdict(job.machine),
        settings=job.settings,
        exact_match=exact_match,
        forecast=job.forecast,
        samples=samples or [],
        held_out=recorder.validator.result(journal.saved_step),
        sources=recorder.validator.by_source(journal.done, tokens_per_s),
        plain_text=job.config.data.format == "text",
        warnings=journal.warnings,
        error=journal.error,
        resumed_from_step=journal.resumed_from_step,
        peak_outside_steps_gib=outside,
        resume_command=run_folder.resume_command(job) if resumable else None,
        ranks=_ranks(recorder),
        rows_per_s=job.config.train.batch_rows / seconds if (seconds := metrics.median_seconds(steps)) else None,
        gpu_busy=statistics.mean(recorder.stops.busy) if recorder.stops.busy else None,
        ended_early=recorder.validator.ended_early if status in ("completed", "running") else None,
    )


def _ranks(recorder: "StepRecorder") -> RanksSeen | None:
    ranks = recorder.job.ranks
    if ranks.size == 1:
        return None
    seen = [step.straggler for step in metrics.steady(recorder.journal.steps) if step.straggler is not None]
    straggler = statistics.median(seen) if seen else None
    nodes = ranks.size // ranks.local_size
    return RanksSeen(ranks.size, nodes, recorder.stops.peaks_gib, straggler, recorder.stops.busy)
