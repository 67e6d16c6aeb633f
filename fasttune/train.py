"""One fine-tuning run, a straight line: config → output folder → model → data → train → save → report.

    result = run(config.load("configs/quickstart.yaml"), terminal.Reporter(...))

Unsloth and torch are imported inside the functions: bad input must fail in a second, not in ten.
"""

import importlib.metadata
import json
import math
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fasttune import builtin, hardware, metrics, output, plan, report
from fasttune import config as configuration
from fasttune.config import Config
from fasttune.data import sources, tokens
from fasttune.errors import FasttuneError, RunFailed
from fasttune.hardware import Hardware
from fasttune.metrics import RunResult, Sample, Setting, StepMetrics
from fasttune.plan import Plan
from fasttune.quiet import LibraryLog, library_log, take_over_loggers

PACKAGES = ["torch", "triton", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "xformers", "flash-attn"]
MATMUL_SECONDS = 1.0  # spent after the run on measuring this machine's matmul rate


class Reporter(Protocol):
    """What a run tells the person; terminal.Reporter prints it."""

    def note(self, text: str) -> None: ...
    def start(self, title: str, hardware_line: str, settings: list[Setting], total_steps: int) -> None: ...
    def step(self, step: StepMetrics) -> None: ...
    def warn(self, text: str) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Job:
    """Everything that is ready before the first step."""

    config: Config  # every `auto` resolved
    folder: Path
    machine: Hardware
    plan: Plan
    model: Any
    tokenizer: Any
    data: tokens.Tokenized
    problems: list[Any]
    total_steps: int
    usd_per_hour: float | None
    settings: list[Setting]


@dataclass
class Outcome:
    """How the training itself ended."""

    status: Literal["completed", "interrupted", "failed"] = "completed"
    error: str | None = None
    steps: list[StepMetrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run(config: Config, reporter: Reporter) -> RunResult:
    """Train, write the output folder and return what happened.

    Raises FasttuneError for bad input, with nothing written. Once training has begun every ending is a RunResult and a
    run.json: completed, interrupted (SIGINT, SIGTERM: the adapter so far is saved) or failed.
    """
    started = time.perf_counter()
    folder = preflight(config)
    with library_log() as log:
        job = prepare(config, folder, reporter)
        begin(job, log)
        with tempfile.TemporaryDirectory() as scratch:
            from fasttune import model as models, samples, trainer as trainers

            initial = models.save_initial(job.model, job.config.lora, Path(scratch) / "initial")
            before = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
            trainer = trainers.build(
                job.config, job.plan, job.model, job.tokenizer, job.data, job.total_steps, Path(scratch)
            )
            reporter.start(job.config.name, hardware_line(job.machine), job.settings, job.total_steps)
            outcome = train(job, trainer, reporter)
            if outcome.steps and outcome.status != "failed":
                kind = "model" if job.config.train.method == "full" else "adapter"
                models.save(job.model, job.tokenizer, folder / kind, initial)
            after = samples.answer(job.model, job.tokenizer, job.problems, job.plan.gradient_checkpointing)
        result = summarize(job, outcome, trainer, started)
        result.samples = [
            Sample(problem.question, problem.reference, old, new)
            for problem, old, new in zip(job.problems, before, after, strict=True)
        ]
    report.write_json(folder / "run.json", result.as_dict())
    report.write_html(folder / "report.html", result, outcome.steps)
    return result


def preflight(config: Config) -> Path:
    """Everything that can be refused without importing torch. Returns the output folder, not yet made."""
    folder = output.choose(config)
    for source in filter(None, (config.data.train, config.data.eval)):
        sources.check(source, config.data.split)
    if config.model.name.startswith("builtin:"):
        builtin.check(config.model.name)
    return folder


def prepare(config: Config, folder: Path, reporter: Reporter) -> Job:
    """Plan, model and data, ready to train. Writes nothing."""
    reporter.note("importing unsloth and torch …")
    from fasttune import model as models, samples

    take_over_loggers()
    machine = hardware.detect(folder)
    chosen = plan.resolve(config, machine, plan.Shape.of(models.read_architecture(config.model)))
    config = chosen.apply(config)
    reporter.note(f"loading {config.model.name} …")
    policy, full = chosen.gradient_checkpointing, config.train.method == "full"
    model, tokenizer = models.load(config.model, chosen.dtype, policy, full, config.seed)
    model = model if full else models.add_lora(model, config.lora, policy, config.seed)
    settings = list(chosen.settings)
    if tokens.ensure_template(tokenizer):
        settings.append(Setting("chat template", "plain headings", "the tokenizer brings none"))
    reporter.note(f"reading {config.data.train} …")
    rows = sources.read(config.data.train, "train", config.data.split, config.data.max_rows)
    data = tokens.tokenize(
        rows, tokenizer, config.model.max_length, config.data.columns, config.data.train_on, config.data.too_long
    )
    settings.append(Setting("data", f"{config.data.train}: {data.summary()}"))
    output.check_space(folder, models.trained_gib(model) * (2 if config.lora.init == "pissa" else 1))
    usd_per_hour, price = price_of(config, machine)
    settings += [price] if price else []
    return Job(
        config=config,
        folder=folder,
        machine=machine,
        plan=chosen,
        model=model,
        tokenizer=tokenizer,
        data=data,
        problems=samples.read(config, tokenizer),
        total_steps=count_steps(config, len(data)),
        usd_per_hour=usd_per_hour,
        settings=settings,
    )


def begin(job: Job, log: LibraryLog) -> None:
    """Make the output folder and write the resolved config into it."""
    output.create(job.folder)
    log.move_to(job.folder / "library.log")
    header = "# Resolved by fasttune; run it again with: fasttune train config.yaml\n"
    (job.folder / "config.yaml").write_text(configuration.dump(_portable(job.config), header), encoding="utf-8")


def train(job: Job, trainer: Any, reporter: Reporter) -> Outcome:
    """All optimizer steps, one line of metrics.jsonl each, flushed as they come."""
    from fasttune.trainer import StepRecorder, backend

    outcome = Outcome()
    lines = (job.folder / "metrics.jsonl").open("w", encoding="utf-8")

    def on_step(step: StepMetrics) -> None:
        outcome.steps.append(step)
        lines.write(json.dumps(asdict(step)) + "\n")
        lines.flush()
        if step.step == 1:
            for text in broken_promises(job, trainer, backend(trainer)):
                outcome.warnings.append(text)
                reporter.warn(text)
        reporter.step(step)
        if not math.isfinite(step.loss):
            raise RunFailed(
                f"the loss of step {step.step} is {step.loss}; lower train.learning_rate or look at the data"
            )

    recorder = StepRecorder(trainer, on_step)
    trainer.add_callback(recorder)
    try:
        with lines, signals_to(recorder.stop):
            trainer.train()
    except KeyboardInterrupt:
        outcome.status, outcome.error = "interrupted", "stopped at once by a second signal"
    except Exception as error:  # every ending is reported in run.json
        outcome.status, outcome.error = "failed", _one_line(error)
        print(traceback.format_exc())  # into library.log
    finally:
        reporter.stop()
    if recorder.stopped_by is not None and outcome.status == "completed":
        outcome.status, outcome.error = "interrupted", f"stopped by {recorder.stopped_by.name}"
    return outcome


def broken_promises(job: Job, trainer: Any, live: metrics.Backend) -> list[str]:
    """What was asked for and is not what runs: a setting is never ignored in silence."""
    found = []
    optimizer = getattr(trainer.args.optim, "value", trainer.args.optim)
    if optimizer != job.plan.optimizer:
        found.append(f"train.optimizer={job.plan.optimizer} was replaced: {optimizer} runs on this machine")
    if live.gradient_checkpointing != job.plan.gradient_checkpointing:
        asked = job.plan.gradient_checkpointing
        found.append(f"train.gradient_checkpointing={asked} was replaced: {live.gradient_checkpointing} runs")
    if job.plan.dtype == "bfloat16" and not trainer.args.bf16:
        found.append("model.dtype=bfloat16: this CPU has no native bf16, so it is emulated and slow; set float32")
    if job.machine.gpus and live.patched_layers < job.plan.shape.layers:
        found.append(
            f"Unsloth patched {live.patched_layers} of {job.plan.shape.layers} layers: the rest runs plain transformers"
        )
    return found


def summarize(job: Job, outcome: Outcome, trainer: Any, started: float) -> RunResult:
    """Every number of run.json, from the steps that were measured and the objects that ran."""
    from fasttune import model as models
    from fasttune.trainer import backend, peak_memory_gib

    steps, steady = outcome.steps, metrics.steady(outcome.steps)
    tokens_seen = sum(step.tokens for step in steps)
    padding = sum(step.padding_tokens for step in steps)
    speed = metrics.median_rate(steps)
    achieved = matmul = None
    if steady and job.config.model.quantization == "none":
        flops = models.count_flops(job.model)
        rows = job.config.train.batch_rows
        achieved = statistics.median(flops.of_step(s.tokens, s.loss_tokens, rows) / s.seconds for s in steady) / 1e12
        matmul = measured_matmul_tflops(job)
    peak = hardware.peak_bf16_tflops(job.machine.gpus[0].name) if job.machine.gpus else None
    wall_s = time.perf_counter() - started
    price = job.usd_per_hour
    return RunResult(
        status=outcome.status,
        name=job.config.name,
        output_dir=str(job.folder),
        steps=len(steps),
        first_loss=steps[0].loss if steps else None,
        last_loss=steps[-1].loss if steps else None,
        tokens=tokens_seen,
        loss_tokens=sum(step.loss_tokens for step in steps),
        padding_fraction=padding / max(tokens_seen + padding, 1),
        tokens_per_s=speed,
        loss_tokens_per_s=metrics.median_rate(steps, "loss_tokens"),
        steady_steps=len(steady),
        seconds_to_first_step=trainer.first_step_done - started if steps else None,
        wall_s=wall_s,
        peak_memory_gib=peak_memory_gib(),
        mfu=achieved / peak if achieved and peak and job.plan.dtype == "bfloat16" else None,
        fraction_of_measured_matmul=achieved / matmul if achieved and matmul else None,
        measured_matmul_tflops=matmul,
        flops_formula=metrics.FLOPS_FORMULA,
        cost_usd=price * wall_s / 3600 if price is not None else None,
        usd_per_hour=price,
        usd_per_million_tokens=price / 3600 / speed * 1e6 if price is not None and speed else None,
        backend=backend(trainer),
        versions=versions(),
        hardware=asdict(job.machine),
        settings=job.settings,
        warnings=outcome.warnings,
        error=outcome.error,
    )


def measured_matmul_tflops(job: Job) -> float:
    """This machine's matmul rate at the run's own shape: tokens of a micro-batch × hidden × MLP width."""
    architecture = job.model.config
    mean_length = sum(map(len, job.data.input_ids)) // len(job.data)
    width = getattr(architecture, "intermediate_size", None) or 4 * architecture.hidden_size
    shape = (job.plan.micro_batch_rows * mean_length, architecture.hidden_size, width)
    device = "cuda" if job.machine.gpus else "cpu"
    return hardware.measure_matmul_tflops(device, job.plan.dtype, [shape], MATMUL_SECONDS)[shape]


def count_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the run: max_steps, or whole epochs with their last, smaller batch."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return math.ceil(config.train.epochs * math.ceil(rows / config.train.batch_rows))


def price_of(config: Config, machine: Hardware) -> tuple[float | None, Setting | None]:
    """Dollars an hour of this machine, and the setting to show; None where nobody can know."""
    if config.usd_per_hour is not None:
        return config.usd_per_hour, Setting("price", f"${config.usd_per_hour:g} an hour")
    known = hardware.usd_per_hour(machine.gpus[0].name) if machine.gpus else None
    reason = f"an example of {hardware.USD_PER_HOUR_DATE}; set usd_per_hour to yours"
    return known, Setting("price", f"${known:g} an hour", reason) if known is not None else None


def versions() -> dict[str, str]:
    """Versions of the packages that did the work, where they are installed."""
    found = {}
    for package in ["fasttune", *PACKAGES]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware_line(machine: Hardware) -> str:
    """The machine in one line."""
    if machine.gpus:
        gpu = machine.gpus[0]
        return f"{gpu.name}, {gpu.memory_gib:.0f} GiB, driver {machine.driver}"
    return f"{machine.cpu_model}, {machine.cores} cores, {machine.memory_gib:.0f} GiB, no GPU"


@contextmanager
def signals_to(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` while training runs."""
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def _portable(config: Config) -> Config:
    """As config.yaml keeps it: local paths absolute, and no output folder, so that it can be run again as it is."""

    def absolute(name: str | None) -> str | None:
        path = Path(name).expanduser() if name and not name.startswith("builtin:") else None
        return str(path.resolve()) if path and path.exists() else name

    data = config.data.model_copy(update={"train": absolute(config.data.train), "eval": absolute(config.data.eval)})
    model = config.model.model_copy(update={"name": absolute(config.model.name)})
    return config.model_copy(update={"data": data, "model": model, "output_dir": None, "overwrite": False})


def _one_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, FasttuneError) else f"{type(error).__name__}: {text}"
