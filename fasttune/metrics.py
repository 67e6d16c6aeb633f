"""Tokens, seconds, FLOPs, GiB and dollars: result types and the formulas behind every number that is printed.

Shapes: B rows of a micro-batch, T tokens of a row.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

WARMUP_STEPS = 3  # left out of the median: allocator, thread pools and kernels warm up in the first steps

FLOPS_FORMULA = (
    "per token: 2n forward (n = weights of the linear layers; lm_head only on loss tokens) + 2n input gradients "
    "+ 2m weight gradients (m = trained weights only) + causal attention 2·L·T·d forward and twice that backward; "
    "recomputation not counted"
)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as one line of `metrics.jsonl`. Tokens count no padding; seconds are device-synchronised.

    peak_memory_gib: of a GPU in this very step; of a CPU that of the process, until now.
    computed_tokens: of `tokens`, those really computed: what rows of a pack begin with alike, once.
    eval_*: on held-out rows, after the step; None where none was due. In no `seconds` of a step.
    straggler: longest over mean seconds that the ranks computed, before they waited for each other; None of one.
    adapter_*: the largest of a layer, before its factors were balanced after this step (core/spectral.py); else None.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens: int
    computed_tokens: int
    loss_tokens: int
    padding_tokens: int
    seconds: float
    tokens_per_s: float
    peak_memory_gib: float
    eval_loss: float | None = None
    eval_token_accuracy: float | None = None
    eval_exact_match: float | None = None
    straggler: float | None = None
    adapter_condition: float | None = None
    adapter_balance: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """After `step`, on the supervised tokens of held-out rows: mean loss, and the share that is the first guess.

    exact_match: share of the problems answered rightly, on the way; None at the ends, which RunResult has.
    loss_by_source: of each source of held-out rows, where there are several.
    """

    step: int
    loss: float
    token_accuracy: float
    exact_match: float | None = None
    loss_by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """The evaluations of a run. best: the lowest loss after a step; saved_step: whose weights are saved."""

    rows: int
    loss_tokens: int
    before: Evaluation | None
    after: Evaluation | None
    best: Evaluation | None
    saved_step: int | None


@dataclass(frozen=True)
class SourceSeen:
    """What was trained on of one of several sources. Tokens of rows by themselves; of documents, of whole sequences.

    tokens_per_s: its share of the run's. *_loss: on its held-out rows, before the first step and after the last.
    """

    source: str
    tokens: int
    tokens_per_s: float | None
    first_loss: float | None
    last_loss: float | None


@dataclass(frozen=True)
class Setting:
    """One resolved setting. `reason` is None where the config said so, else why fasttune chose the value."""

    name: str
    value: str
    reason: str | None = None


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the model's greedy answer before and after training.

    *_right: as the exact match counts it; None where the reference holds no `#### N`.
    """

    prompt: str
    reference: str
    before: str
    after: str
    before_right: bool | None = None
    after_right: bool | None = None


@dataclass(frozen=True)
class ExactMatch:
    """Share of held-out problems (0 to 1) whose answer ends in the right number, before and after training."""

    problems: int
    before: float
    after: float


@dataclass(frozen=True)
class Backend:
    """What actually ran, read from the live model and trainer, never from the request."""

    library: str
    attention: str
    packing: str
    patched_layers: int  # whose attention is Unsloth's
    gradient_checkpointing: str
    dtype: str
    optimizer: str = "not seen"
    patched_mlps: int = 0  # layers whose MLP is Unsloth's
    fused_lora_layers: int = 0  # layers whose attention has its fused LoRA functions


@dataclass(frozen=True)
class RanksSeen:
    """The processes of a run. straggler: median over the steady steps, see StepMetrics. gpu_busy: see RunResult."""

    ranks: int
    nodes: int
    peak_memory_gib: list[float]  # of each rank
    straggler: float | None
    gpu_busy: list[float]


@dataclass(frozen=True)
class Range:
    """A forecast: what is expected, and between what it should lie."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Memory:
    """Peak memory by part, in GiB. `process` is a CPU's only: Python and its libraries."""

    process: float
    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    slack: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class KernelGroup:
    """Kernels of a step that do one thing. bound: matmul, attention or memory; launches where no kernel runs."""

    name: str
    flops: float
    bytes: float
    ms: float
    bound: str


@dataclass(frozen=True)
class Roofline:
    """Where the time of a mean step should go on a GPU. assumed: how much of its peaks, and where that was seen."""

    groups: list[KernelGroup]
    tokens: float
    ms: float
    tokens_per_s: float
    assumed: str


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to need; None where nothing honest can be said."""

    memory_gib: Memory
    peak_memory_gib: Range
    largest_micro_batch_tokens: int
    steps: int
    tokens: int
    tokens_per_s: Range | None
    hours: Range | None
    usd: Range | None
    rate: str  # where the speed comes from, or why there is none
    without_evaluation: bool = False  # the run evaluates, and hours and usd leave that out
    roofline: Roofline | None = None


Status = Literal["running", "completed", "interrupted", "failed"]


class Stopped(StrEnum):
    """What ended a run that is `interrupted`: its `error`."""

    SIGINT = "stopped by SIGINT"
    SIGTERM = "stopped by SIGTERM"
    MAX_HOURS = "stopped by checkpoint.max_hours"
    AT_ONCE = "stopped at once by a second signal"


@dataclass
class RunResult:
    """The contract of `run.json`. Speeds are medians of the steady steps; None means "cannot be said honestly".

    computed_tokens: of `tokens`, those really computed: a beginning that rows of a pack share counts once.

    A run that is `running` and that no process holds was killed: `--resume` does the rest.
    """

    status: Status
    name: str
    output_dir: str
    steps: int
    first_loss: float | None
    last_loss: float | None
    tokens: int
    computed_tokens: int
    loss_tokens: int
    padding_fraction: float
    tokens_per_s: float | None
    computed_tokens_per_s: float | None
    loss_tokens_per_s: float | None
    steady_steps: int
    seconds_to_first_step: float | None
    wall_s: float
    peak_memory_gib: float
    mfu: float | None
    fraction_of_measured_matmul: float | None
    measured_matmul_tflops: float | None
    flops_formula: str
    cost_usd: float | None
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    backend: Backend
    versions: dict[str, str]
    hardware: dict[str, Any]
    settings: list[Setting]
    exact_match: ExactMatch | None = None
    forecast: Forecast | None = None
    samples: list[Sample] = field(default_factory=list)
    held_out: HeldOut | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    resumed_from_step: int | None = None
    peak_outside_steps_gib: float | None = None  # of a GPU: loading, proof and evaluation; peak_memory_gib: the steps
    resume_command: str | None = None  # of a run that is not completed, and of which something is kept
    ranks: RanksSeen | None = None  # of a run of several processes, whose tokens, FLOPs and dollars are those of all
    rows_per_s: float | None = None
    sources: list[SourceSeen] = field(default_factory=list)  # where there are several
    plain_text: bool = False  # what was trained on: then the loss is also told as perplexity
    gpu_busy: float | None = None  # mean share of the steps' time in which the GPU ran kernels, as its driver says
    ended_early: str | None = None  # why one that is completed has fewer steps than it might: early_stopping_patience


def steady(steps: list[StepMetrics]) -> list[StepMetrics]:
    """The steps that count for a speed: all after WARMUP_STEPS, or all but the first of a very short run."""
    return steps[WARMUP_STEPS:] if len(steps) > 2 * WARMUP_STEPS else steps[1:]


def wilson(right: float, count: int) -> tuple[float, float]:
    """95 % interval, each end 0 to 1, of a share: `right` of `count` problems. Honest at none and at all of them, too,
    where the mean's standard error is 0: E. B. Wilson, https://doi.org/10.1080/01621459.1927.10502953
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    share, grown = right / count, 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / grown
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / grown
    # At the ends exactly, which a sum of floats would miss.
    return 0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half


def median_rate(steps: list[StepMetrics], attribute: str = "tokens") -> float | None:
    """Median of `attribute` per second over the steady steps, or None when there is none."""
    rates = [getattr(step, attribute) / step.seconds for step in steady(steps)]
    return statistics.median(rates) if rates else None


def median_seconds(steps: list[StepMetrics]) -> float | None:
    """Of a steady step, or None when there is none."""
    seconds = [step.seconds for step in steady(steps)]
    return statistics.median(seconds) if seconds else None


@dataclass(frozen=True)
class Flops:
    """Model FLOPs per token, split by where they are spent.

    body: per token of the row, everything but attention scores and lm_head.
    attention: per token per token of context (multiply by the mean row length).
    head: per token that has a label.
    """

    body: float
    attention: float
    head: float

    def of_step(self, computed_tokens: int, loss_tokens: int, mean_length: float) -> float:
        """FLOPs of a step that computes so many tokens and has so many labels, in rows of that mean length."""
        return computed_tokens * (self.body + self.attention * mean_length) + loss_tokens * self.head


def count_flops(
    linear_weights: int, trained_weights: int, head_weights: int, head_trained: bool, layers: int, attention_width: int
) -> Flops:
    """FLOPs per token of one training step, recomputation not counted (FLOPS_FORMULA).

    linear_weights: weights of all linear layers with lm_head left out, adapters included.
    trained_weights: how many of those receive a weight gradient.
    attention_width: heads × head_dim. Causal attention does half of the 4·T·width a full one does in forward.
    Source: PaLM, appendix B (https://arxiv.org/abs/2204.02311), with the LoRA rule for frozen weights.
    """
    body = 2 * linear_weights + 2 * linear_weights + 2 * trained_weights
    attention = 3 * 2 * layers * attention_width
    head = 2 * head_weights * (3 if head_trained else 2)
    return Flops(body=float(body), attention=float(attention), head=float(head))
