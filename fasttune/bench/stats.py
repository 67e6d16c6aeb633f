"""What a benchmark measures and says: the contract of bench.json. Pure data and statistics, no torch.

A *repeat* is one arm run once, in a fresh process; an *arm* is all its repeats.
"""

import math
import random
import re
import statistics
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from fasttune import chips
from fasttune.metrics import Backend

BASELINE = "vanilla"
FASTEST = "fasttune"
MIN_REPEATS = 5  # fewer are shown, but are no claim
WARMUP_STEPS = 1  # of a repeat, left out of its speed: kernels are chosen and memory is fetched in the first step
BOOTSTRAP_DRAWS = 10_000
# Largest relative difference of a step's loss between two arms. fp32 arms differ by the order of their sums (1e-5 was
# seen between two cross entropies alone); bf16 keeps 8 bits. A wrong label or learning rate shows as percents.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
NO_REVISION = "not a checkout"  # of an installed package
# What bench.json has the median and range of.
SPREADS = ["tokens_per_s", "computed_tokens_per_s", "loss_tokens_per_s", "step_s", "peak_memory_gib"]
SPREADS += ["seconds_to_first_step", "power_w"]


@dataclass(frozen=True)
class Repeat:
    """One arm, once. Lists have one entry a step. Tokens count no padding; seconds are device-synchronised.

    computed_tokens: of `tokens`, a beginning that rows share counted once.
    rows_digest: hash of every step's rows, read from the tensors that were trained on.
    weights_digest: of the live model before the first step, see what_ran.fingerprint; "" in older files.
    peak_memory_gib: of a GPU in the steps, peak_before_gib before them; of a CPU of all the process.
    power_w: mean of the seconds in which the GPU worked; at_power_limit: the share of them in which its clocks were
    lower for its power limit. None where it is not known, as on a CPU.
    """

    tokens: list[int]
    computed_tokens: list[int]
    loss_tokens: list[int]
    padding_tokens: list[int]
    seconds: list[float]
    losses: list[float]
    rows_digest: str
    peak_memory_gib: float
    seconds_to_first_step: float
    flops_per_token: float | None  # see what_ran.count_flops
    backend: Backend
    weights_digest: str = ""
    peak_before_gib: float | None = None
    power_w: float | None = None
    at_power_limit: float | None = None
    straggler: float | None = None  # of several processes, see metrics.StepMetrics

    @property
    def tokens_per_s(self) -> float:
        return self._rate(self.tokens)

    @property
    def computed_tokens_per_s(self) -> float:
        return self._rate(self.computed_tokens)

    @property
    def loss_tokens_per_s(self) -> float:
        return self._rate(self.loss_tokens)

    @property
    def step_s(self) -> float:
        return statistics.median(self.seconds[WARMUP_STEPS:])

    @property
    def padding_fraction(self) -> float:
        return sum(self.padding_tokens) / max(sum(self.tokens) + sum(self.padding_tokens), 1)

    def _rate(self, counts: list[int]) -> float:
        """Median over the steady steps."""
        pairs = list(zip(counts, self.seconds, strict=True))[WARMUP_STEPS:]
        return statistics.median(count / seconds for count, seconds in pairs)


@dataclass
class Arm:
    """All repeats of an arm, or why there are none."""

    name: str
    what: str  # one line: what a person would call it
    repeats: list[Repeat] = field(default_factory=list)
    failure: str | None = None
    processes: int = 1

    def values(self, attribute: str) -> list[float]:
        """An attribute of Repeat, of each repeat of which it is known."""
        return [value for repeat in self.repeats if (value := getattr(repeat, attribute)) is not None]

    def median(self, attribute: str) -> float | None:
        values = self.values(attribute)
        return statistics.median(values) if values else None

    @property
    def tflops(self) -> float | None:
        """Median of the model TFLOP/s of its repeats; None where there are none, or their FLOPs are not known."""
        rates = [repeat.tokens_per_s * repeat.flops_per_token for repeat in self.repeats if repeat.flops_per_token]
        return statistics.median(rates) / 1e12 if rates else None

    @property
    def larger_before_gib(self) -> float | None:
        """The most memory before the first step, where that is more than in the steps: it decides what fits."""
        before = max(self.values("peak_before_gib"), default=0.0)
        return before if before > max(self.values("peak_memory_gib"), default=0.0) else None


@dataclass(frozen=True)
class ArmComparison:
    """One arm over another: ratio of the medians of tokens/s with a bootstrap 95 % interval.

    invalid: why the two cannot be compared (they did not do the same work); None if they can.
    """

    arm: str
    over: str
    ratio: float
    low: float
    high: float
    largest_loss_difference: float
    tolerance: float
    invalid: str | None


@dataclass(frozen=True)
class Limit:
    """What the machine's matmuls allow: tokens/s if only the model's own matmuls took time, at their own shapes."""

    tflops: float  # FLOPs of a token over the time its matmuls take
    flops_per_token: float
    tokens_per_s: float
    formula: str
    shapes: dict[str, float]  # "m x k x n" → measured TFLOP/s


@dataclass
class Bench:
    """Everything that was measured and what follows from it."""

    name: str
    command: str
    model: str
    method: str  # LoRA | full fine-tuning
    dtype: str
    steps: int
    batch_rows: int
    max_length: int
    job_tokens: int  # of the user's whole job, all epochs
    arms: list[Arm]
    limit: Limit | None
    usd_per_hour: float | None
    hardware: dict[str, Any]
    versions: dict[str, str]
    git: str
    date: str
    objections: list[str] = field(default_factory=list)  # why the numbers are no claim
    baseline: str = BASELINE
    fastest: str = FASTEST

    @property
    def scales(self) -> bool:
        """Whether its arms are the same run on several numbers of processes."""
        return any(arm.processes > 1 for arm in self.arms)

    def efficiency(self, arm: Arm) -> float | None:
        """Its speed over that of so many times the baseline."""
        speed, base = arm.median("tokens_per_s"), self.arm(self.baseline)
        alone = base.median("tokens_per_s") if base else None
        return speed / alone / (arm.processes / base.processes) if speed and alone and base else None

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @cached_property
    def comparisons(self) -> list[ArmComparison]:
        """Every arm that ran against the baseline, and fasttune against every other."""
        ran = [arm for arm in self.arms if arm.repeats]
        return [
            compare(arm, over, LOSS_TOLERANCE[self.dtype])
            for over in ran
            for arm in ran
            if arm is not over and (over.name == self.baseline or arm.name == self.fastest)
        ]

    @property
    def over_baseline(self) -> dict[str, ArmComparison]:
        """By the arm's name."""
        return {each.arm: each for each in self.comparisons if each.over == self.baseline}

    @property
    def invalid(self) -> list[str]:
        """Which arms cannot be compared, and why."""
        return [f"{each.arm} against {each.over}: {each.invalid}" for each in self.comparisons if each.invalid]

    @property
    def valid(self) -> bool:
        return not self.invalid

    @property
    def sound_limit(self) -> Limit | None:
        """`limit`, unless an arm was faster: then it is none."""
        best = max((arm.tflops or 0 for arm in self.arms), default=0)
        return self.limit if self.limit and best <= self.limit.tflops else None

    @property
    def limit_unknown(self) -> str | None:
        """Why there is no share of a limit, where the model or the measurement is the reason."""
        if self.limit and not self.sound_limit:
            why = f"an arm computed more than the {self.limit.tflops:.2g} TFLOP/s that were measured of matmuls alone"
            return f"{why}: no limit is shown (the model is too small to measure one, or the machine was busy)"
        if self.scales or not any(arm.repeats for arm in self.arms) or any(arm.tflops is not None for arm in self.arms):
            return None
        return "the FLOPs of quantised weights and of a mixture of experts are not counted: no share of a limit, no MFU"

    def mfu(self, arm: Arm) -> float | None:
        """Model FLOPs (metrics.FLOPS_FORMULA) over the dense bf16 peak of the datasheet.

        None for another dtype, quantised weights, a mixture of experts or an unknown chip.
        """
        if arm.tflops is None or self.dtype != "bfloat16" or not self.hardware["gpus"]:
            return None
        peak = chips.peak_bf16_tflops(self.hardware["gpus"][0]["name"])
        if not peak or re.search("int|float8", arm.repeats[-1].backend.dtype):  # integers: quantised
            return None
        return arm.tflops / peak

    def share_of_limit(self, arm: Arm) -> float | None:
        """Model FLOPs over the matmul rate that was measured in the same run."""
        return arm.tflops / self.sound_limit.tflops if arm.tflops is not None and self.sound_limit else None

    def usd_per_million(self, arm: Arm) -> float | None:
        speed = arm.median("tokens_per_s")
        return self.usd_per_hour / 3600 / speed * 1e6 if speed and self.usd_per_hour is not None else None

    def job_hours(self, arm: Arm) -> float | None:
        speed = arm.median("tokens_per_s")
        return self.job_tokens / speed / 3600 if speed else None

    def as_dict(self) -> dict[str, Any]:
        """bench.json."""
        document = asdict(self)
        cost: dict[str, Any] = {}
        for arm, plain in zip(self.arms, document["arms"], strict=True):
            plain |= {name: spread(arm.values(name)) for name in SPREADS}
            plain["padding_fraction"] = arm.median("padding_fraction")
            plain["losses"] = arm.repeats[0].losses if arm.repeats else []
            plain["backend"] = asdict(arm.repeats[-1].backend) if arm.repeats else None
            plain |= {"mfu": self.mfu(arm), "share_of_limit": self.share_of_limit(arm)}
            cost[arm.name] = {"usd_per_million_tokens": self.usd_per_million(arm), "job_hours": self.job_hours(arm)}
            plain |= cost[arm.name]
            plain["efficiency"] = self.efficiency(arm) if self.scales else None
        document["cost"] = {"usd_per_hour": self.usd_per_hour, "job_tokens": self.job_tokens, "arms": cost}
        return document | {"comparisons": [asdict(c) for c in self.comparisons], "valid": self.valid}


def compare(arm: Arm, over: Arm, tolerance: float) -> ArmComparison:
    """Ratio of medians of tokens/s; invalid if rows, tokens or losses of any two repeats differ."""
    low, high = bootstrap_ratio(arm.values("tokens_per_s"), over.values("tokens_per_s"))
    ratio = (arm.median("tokens_per_s") or 0) / (over.median("tokens_per_s") or 1)
    pairs = [(a, b) for a in arm.repeats for b in over.repeats]
    finite = all(math.isfinite(loss) for repeat in (*arm.repeats, *over.repeats) for loss in repeat.losses)
    losses = [both for a, b in pairs for both in zip(a.losses, b.losses, strict=False)]
    difference = max(abs(x - y) / max(abs(y), 1e-12) for x, y in losses) if finite else math.inf
    invalid = None
    if any(a.rows_digest != b.rows_digest for a, b in pairs):
        invalid = "they saw different rows"
    elif any(a.weights_digest != b.weights_digest for a, b in pairs):
        invalid = "they began with different weights"
    elif any(a.tokens != b.tokens or a.loss_tokens != b.loss_tokens for a, b in pairs):
        invalid = "they count tokens differently"
    elif any(len(a.losses) != len(b.losses) for a, b in pairs):
        invalid = "they logged different numbers of losses"
    elif not finite:
        invalid = "a loss is not finite"
    elif difference > tolerance:
        invalid = f"their losses differ by {difference:.1%}, more than {tolerance:.1%}"
    return ArmComparison(arm.name, over.name, ratio, low, high, difference, tolerance, invalid)


def bootstrap_ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float]:
    """95 % percentile interval of the ratio of medians, repeats drawn with replacement within each arm; seeded.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    rng = random.Random(0)
    ratios = sorted(
        statistics.median(rng.choices(numerator, k=len(numerator)))
        / statistics.median(rng.choices(denominator, k=len(denominator)))
        for _ in range(BOOTSTRAP_DRAWS)
    )
    return ratios[round(0.025 * BOOTSTRAP_DRAWS)], ratios[round(0.975 * BOOTSTRAP_DRAWS) - 1]


def spread(values: list[float]) -> dict[str, Any]:
    """All values with their median and range."""
    if not values:
        return {"values": [], "median": None, "min": None, "max": None}
    return {"values": values, "median": statistics.median(values), "min": min(values), "max": max(values)}
