"""Config → a Job: everything that is ready before the first step. Nothing is written here.

Unsloth and torch are imported inside `prepare`: bad input must fail in a second, not in ten.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fasttune import builtin, hardware, output, plan
from fasttune.config import Config
from fasttune.data import sources, tokens
from fasttune.hardware import Hardware
from fasttune.metrics import Setting, StepMetrics
from fasttune.plan import Plan
from fasttune.quiet import take_over_loggers


class Reporter(Protocol):
    """What a run tells the person; terminal.Reporter prints it."""

    def note(self, text: str) -> None: ...
    def start(
        self,
        title: str,
        hardware_line: str,
        settings: list[Setting],
        total_steps: int,
        usd_per_hour: float | None = None,
    ) -> None: ...
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
