"""What a run will need, from its plan and its encoded rows: memory, tokens, hours, dollars, each with a range.

    add_to(job)                           # of a run that is ready to train
    expected = of_run(config, chosen, data, machine, usd_per_hour, scale)      # of a sample of its rows

Speed is model FLOPs of a step over the rate that this kind of machine has shown (rates.json, made from
benchmarks/results); where it has shown none, a wide range of what such chips do. A CPU's rate is a share of what its
matmuls do just now, because a rented one is faster or slower with its neighbours: a second goes into measuring that.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fasttune import hardware
from fasttune.config import Config
from fasttune.core import schedules
from fasttune.core.autoconfig import Plan
from fasttune.core.memory import Workload, forecast
from fasttune.core.prepare import Job
from fasttune.data.batching import Batches
from fasttune.data.tokenize import IGNORE
from fasttune.hardware import Hardware
from fasttune.metrics import Forecast, Range, Setting
from fasttune.report import duration, usd

SMALLEST = 20e6  # parameters: below, Python and launches take the time, not arithmetic
SAMPLED_STEPS, SAMPLED_TOKENS = 100, 2_000_000  # of a run are laid out, until the first of them is reached
MEMORY_ERROR = {"cpu": (0.9, 1.1), "gpu": (0.9, 1.2)}  # as measured; two runs of one GPU
RATE_ERROR = 1.2  # around the repeats of a rate on file
OTHER_JOB_ERROR = 1.5  # where that rate is of another method or layout
MFU = (0.20, 0.60)  # of a GPU without a rate on file: published single-GPU fine-tuning lies between (docs/measuring.md)
CPU_SHARE = (0.35, 0.9)  # of the matmul rate, on a CPU without one
CPU_FIXED_TOKENS = 75  # of a micro-batch on a CPU: their time is spent however few tokens it has (docs/LOG.md)
LAUNCH_S_A_LAYER = Range(0.003, 0.001, 0.0003)  # of a micro-batch on a GPU, while kernels run: a guess; slow first
UNFUSED_LORA = 1.4  # times as long: PEFT's own layers on a CPU, which dropout needs, instead of fused_lora's
START_S, CPU_START_S = Range(10.0, 20.0, 60.0), Range(8.0, 14.0, 30.0)  # imports and preparation; the first a guess
LOAD_S_A_GIB = Range(0.3, 1.0, 3.0)  # of weights, on a GPU: a guess
TOUCH_S_A_GIB = Range(0.5, 1.0, 4.0)  # of peak memory, on a CPU: its first step has the pages given (docs/LOG.md)


@dataclass(frozen=True)
class Sample:
    """The first steps of a run as they are laid out. cells: positions that are computed.

    one_length: everything lies in rectangles, none in packs of rows of many lengths.
    """

    steps: int
    rows: int
    tokens: int
    labels: int
    cells: int
    micro_batches: list[Workload]
    one_length: bool = False

    @property
    def mean_length(self) -> float:
        """Tokens of a row, as it is computed: with padding, and with a beginning that it shares."""
        return max(self.cells, self.tokens) / self.rows


def add_to(job: Job) -> None:
    """The forecast of a run that is ready to train, packed as its live model allows, and the setting that shows it."""
    chosen = replace(job.plan, packed=job.data.packed)
    job.forecast = of_run(job.config, chosen, job.data, job.machine, job.usd_per_hour)
    job.settings.append(Setting("forecast", in_words(job.forecast), f"speed: {job.forecast.rate}"))


def of_run(
    config: Config, chosen: Plan, data: Batches, machine: Hardware, usd_per_hour: float | None, scale: float = 1.0
) -> Forecast:
    """The forecast of a run on `data`, the rows it has or a sample of them; `scale`: how many times as many it has."""
    steps, on_cpu = data.total_steps(config.train.epochs, config.train.max_steps, scale), chosen.gpu_gib is None
    schedules.check(config.train, steps)
    sample = lay_out(data, min(steps, data.steps_per_epoch))
    memories = {each: forecast(config, chosen.shape, chosen, each) for each in set(sample.micro_batches)}
    largest = max(memories, key=lambda each: memories[each].total)
    memory, tokens = memories[largest], round(sample.tokens / sample.steps * steps)
    low, high = MEMORY_ERROR["cpu" if on_cpu else "gpu"]
    peak = Range(low * memory.total, memory.total, high * memory.total)
    rate, source = rate_tflops(config, chosen, machine)
    name = hardware.machine_name(machine)
    groups = None
    if machine.gpus:
        from fasttune.tools import roofline

        groups = roofline.of_step(config, chosen, sample, memory, name)
    if rate is None:
        return Forecast(memory, peak, largest.tokens, steps, tokens, None, None, None, source, False, groups)
    flops, tokens_a_step = step_flops(config, chosen, sample), sample.tokens / sample.steps
    kernels_s = ranged(lambda tera: flops / (tera * 1e12), rate)
    if groups is not None and not _measured(chosen, name):
        kernels_s, source = replace(kernels_s, expected=groups.ms / 1e3), f"{source}; expected by groups of kernels"
    launches = 0 if on_cpu else chosen.shape.layers * len(sample.micro_batches) / sample.steps
    # The CPU launches while the GPU computes: whichever takes longer.
    step_s = ranged(lambda kernels, launch_s: max(kernels, launches * launch_s), kernels_s, LAUNCH_S_A_LAYER)
    speed = ranged(lambda seconds: tokens_a_step / seconds, step_s)
    fixed, a_gib, gib = START_S, LOAD_S_A_GIB, memory.weights
    if on_cpu:
        fixed, a_gib, gib = CPU_START_S, TOUCH_S_A_GIB, memory.total
    start_s = ranged(lambda once, each: once + each * gib, fixed, a_gib)  # imports, loading, a longer first step
    slowest_last = Range(speed.high, speed.expected, speed.low)
    hours = ranged(lambda rate, start: (tokens / rate + start) / 3600, slowest_last, start_s)
    cost = None if usd_per_hour is None else ranged(lambda each: usd_per_hour * each, hours)
    held_out = config.data.eval is not None or config.data.eval_share > 0
    evaluates = held_out and (config.eval.every != "never" or config.eval.problems > 0 or config.samples > 0)
    return Forecast(memory, peak, largest.tokens, steps, tokens, speed, hours, cost, source, evaluates, groups)


def ranged(of: Callable[..., float], *ranges: Range) -> Range:
    """`of` the low, the expected and the high values."""
    return Range(*map(of, *(vars(each).values() for each in ranges)))


def in_words(expected: Forecast) -> str:
    """One line: memory, tokens, time and dollars with their ranges."""
    parts = [f"peak {span(expected.peak_memory_gib, '{:,.1f}'.format)} GiB", f"{expected.tokens:,} tokens"]
    if expected.hours is not None:
        parts.append(span(expected.hours, hours_text))
    if expected.usd is not None:
        parts.append(span(expected.usd, usd))
    parts += ["time and cost without evaluation"] if expected.without_evaluation else []
    return " · ".join(parts)


def span(values: Range, text: Callable[[float], str]) -> str:
    """expected (low to high), each as `text` writes it."""
    return f"{text(values.expected)} ({text(values.low)} to {text(values.high)})"


def hours_text(hours: float) -> str:
    return duration(3600 * hours)


def lay_out(data: Batches, steps: int) -> Sample:
    """The first steps, as the trainer gets them."""
    found: list[Workload] = []
    done = rows = tokens = 0
    one_length = True
    while done < min(steps, SAMPLED_STEPS) and tokens < SAMPLED_TOKENS:
        rows += len(data.rows_of(done))
        tokens += data.tokens_of(done)
        for batch in data.micro_batches(done):
            found.append(Workload.of(batch, IGNORE))
            one_length = one_length and "packed_seq_lengths" not in batch
        done += 1
    labels, cells = sum(each.labels for each in found), sum(each.tokens for each in found)
    return Sample(done, rows, tokens, labels, cells, found, one_length)


def rate_tflops(config: Config, chosen: Plan, machine: Hardware) -> tuple[Range | None, str]:
    """(TFLOP/s to count on, where that comes from); the first is None where nothing can be said, and the last why."""
    if chosen.shape.parameters < SMALLEST:
        return None, "a model this small is bound by overhead, which is not forecast"
    name = hardware.machine_name(machine)
    here = _measured(chosen, name)
    if not machine.gpus:
        return _of_cpu(chosen, name, here)
    job = (config.train.method, chosen.packed)
    here.sort(key=lambda row: (row["method"], row["packed"]) != job)  # the same job first, of those the newest
    if here:
        row, middle = here[0], statistics.median(here[0]["tflops"])
        other = (row["method"], row["packed"]) != job
        error = RATE_ERROR * (OTHER_JOB_ERROR if other else 1)
        source = f"{middle:.3g} TFLOP/s measured on {name}, {row['date']} ({row['source']})"
        source += "; for another job" if other else ""
        return Range(min(row["tflops"]) / error, middle, max(row["tflops"]) * error), source
    from fasttune import chips

    peak = chips.peak_bf16_tflops(name)
    if peak is None or chosen.dtype != "bfloat16":
        return None, f"no speed on file for {name} in {chosen.dtype}, and no datasheet peak to go by"
    return _share(MFU, peak), f"no speed of 5 repeats known: {MFU[0]:.0%} to {MFU[1]:.0%} of {name}'s {peak:g} TFLOP/s"


def _of_cpu(chosen: Plan, name: str, here: list[dict[str, Any]]) -> tuple[Range, str]:
    """A share of the rate that the matmuls of the model's MLP reach now."""
    matmul = hardware.cpu_matmul_tflops(chosen.dtype, chosen.shape.hidden, chosen.shape.mlp)
    if not here:
        share = f"{CPU_SHARE[0]:.0%} to {CPU_SHARE[1]:.0%} of the {matmul:.2g} TFLOP/s its matmuls do now"
        return _share(CPU_SHARE, matmul), f"no run measured on such a CPU: {share}"
    row, shares = here[0], here[0]["shares"]
    middle = statistics.median(shares)
    source = f"{middle:.0%} of the {matmul:.2g} TFLOP/s that matmuls do now, as in {len(shares)} runs on {name}"
    source += f", {row['date']} ({row['source']})"
    return Range(min(shares) / RATE_ERROR * matmul, middle * matmul, max(shares) * RATE_ERROR * matmul), source


def _measured(chosen: Plan, name: str) -> list[dict[str, Any]]:
    return [row for row in on_file() if (row["machine"], row["dtype"]) == (name, chosen.dtype)]


def _share(share: tuple[float, float], of: float) -> Range:
    low, high = share
    return Range(low * of, math.sqrt(low * high) * of, high * of)


def on_file() -> list[dict[str, Any]]:
    """rates.json: a row for each kind of machine and job measured, the newest first. benchmarks/render.py writes it.

    Of a GPU and a job TFLOP/s, a value for each repeat; of a CPU the share of its matmul rate, a value for each run.
    """
    found: list[dict[str, Any]] = json.loads((Path(__file__).parent / "rates.json").read_text(encoding="utf-8"))
    return found


def step_flops(config: Config, chosen: Plan, sample: Sample) -> float:
    """FLOPs of a step: the model's, what is recomputed, and on a CPU what takes as long as so many more would."""
    full, shape = config.train.method == "full", chosen.shape.computed
    adapter = 0 if full else shape.adapter_weights(config.lora.rank, config.lora.targets)
    flops = shape.flops(full, adapter, config.lora.train_embeddings).of_step(
        sample.cells, sample.labels, sample.mean_length
    )
    if chosen.gradient_checkpointing != "none":
        flops += 2 * (shape.linear_weights + adapter) * sample.cells
    if chosen.gpu_gib is None:
        flops *= 1 + CPU_FIXED_TOKENS * len(sample.micro_batches) / sample.cells
        flops *= 1 if full or not config.lora.dropout else UNFUSED_LORA
    return flops / sample.steps
