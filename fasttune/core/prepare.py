"""Config → a Job: everything that is ready before the first step. Nothing is written here.

Unsloth and torch are imported inside `prepare`: bad input must fail in a second, not in ten.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttune import config as configuration, hardware
from fasttune.config import Config
from fasttune.core import autoconfig, pretrained, run_folder, schedules
from fasttune.core.autoconfig import Plan
from fasttune.core.memory import Shape
from fasttune.core.ranks import ALONE, Ranks
from fasttune.data import chat, load, sources
from fasttune.data.batching import Batches, Encoded
from fasttune.errors import ConfigError, DataError, FasttuneError, ModelError
from fasttune.hardware import Hardware
from fasttune.metrics import Forecast, Setting
from fasttune.settings import RESIDUAL, looks_like_hub
from fasttune.system import take_over_loggers
from fasttune.terminal import Reporter

TORCH_ADAMW = "adamw_torch_fused"

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fasttune.core.evaluation import Problem


@dataclass
class Job:
    """Everything that is ready before the first step."""

    config: Config  # every `auto` resolved
    folder: Path
    machine: Hardware
    plan: Plan
    model: "PreTrainedModel"  # wrapped by PEFT where an adapter is trained
    base_weights: str  # fingerprint of those before an adapter came
    tokenizer: "PreTrainedTokenizerBase"
    data: Batches
    held_out: dict[str, list[Encoded]]  # by source
    problems: "list[Problem]"
    total_steps: int
    usd_per_hour: float | None
    settings: list[Setting]
    warnings: list[str]
    forecast: Forecast | None = None  # for run.json, from whoever makes one before the first step
    ranks: Ranks = ALONE


def preflight(config: Config, resume: Path | None = None) -> Path:
    """Everything that can be refused without importing torch. Returns the output folder, not yet made."""
    folder = run_folder.choose(config, resume)
    check_sources_and_model(config)
    return folder


def check_sources_and_model(config: Config) -> None:
    """As `preflight`, of everything but the folder. Raises DataError and ModelError."""
    splits = dict.fromkeys(config.data.sources, config.data.split)
    splits |= {config.data.eval: config.data.held_out_split} if config.data.eval else {}
    columns, unused, forms = config.data.columns, not any(map(looks_like_hub, splits)), set[str]()
    for source, split in splits.items():
        sources.check_source(source, split)
        if not looks_like_hub(source):
            form, renamed = load.form_of(config, source, split)
            unused = not renamed and unused
            forms.add(form)
        else:
            forms.add("auto")
    if columns and unused:
        raise DataError(f"data.columns: no source has {', '.join(columns.values())}: correct the names or remove it")
    if config.data.documents and not any(map(sources.holds_text, splits)):
        what = f"data.documents={config.data.documents} would be ignored"
        raise DataError(f"{what}: no source holds a .txt file, rows of other files are documents already; remove it")
    if forms == {"text"}:
        configuration.changed(config, data={"format": "text"})  # refuses what is of turns
    if config.data.chat_template is not None:
        from fasttune.data import chat_templates

        chat_templates.read(config.data.chat_template)
    pretrained.check_name(config.model.name)
    if config.model.revision is not None and pretrained.is_here(config.model.name):
        what = f"model.revision={config.model.revision} would be ignored"
        raise ModelError(f"{what}: {config.model.name} is no model of the hub; remove it")


def prepare(config: Config, folder: Path, reporter: Reporter, start: Path | None = None, ranks: Ranks = ALONE) -> Job:
    """Plan, model and data, ready to train. Writes nothing. `start`: the adapter that a resumed run split by."""
    ranks.check(config)
    machine = hardware.detect(folder)
    autoconfig.check_paged(config, machine, needs_package=True)
    warnings: list[str] = []
    if machine.gpus:
        from fasttune import gpus

        warnings += filter(None, map(gpus.capped, machine.gpus))
        if lacks := gpus.triton_lacks():
            raise FasttuneError(f"Triton compiles at the first step of a run and needs {lacks[0]} ({lacks[1]})")
    reporter.note("importing unsloth and torch …")
    from fasttune.core import evaluation, model as models, packing, what_ran
    from fasttune.cpu import fused_lora

    take_over_loggers()
    machine = hardware.as_torch_sees(machine)
    if not machine.gpus:
        machine = replace(machine, memory_gib=machine.memory_gib / ranks.local_size)
    config, architecture = fitted(config, warnings.append)
    plan = autoconfig.resolve(config, machine, Shape.of(architecture), ranks.parts)
    auto, settings = config.train.micro_batch_rows == "auto", list[Setting]()
    config = plan.apply(config)
    if not plan.fits:
        warnings.append("the forecast does not fit into memory: `fasttune plan` says what to change")
    for setting in ("plus_ratio", "refactor_every"):  # made for torch's AdamW, and its moments
        if getattr(config.lora, setting) is not None and plan.optimizer != TORCH_ADAMW:
            fix = f"set train.optimizer={TORCH_ADAMW}, or remove it"
            raise ConfigError([f"lora.{setting}: not with train.optimizer={plan.optimizer}: {fix}"])
    if plan.shape.experts > 1:
        warnings.append(f"{autoconfig.EXPERTS_UNCHECKED}: it may not fit even where it is said to")

    reporter.note(f"loading {config.model.name} …")
    policy, full = plan.gradient_checkpointing, config.train.method == "full"
    with ranks.loading():
        model, tokenizer = models.load(config.model, plan.dtype, policy, full, config.seed, plan.fp32_masters)
    base_weights = what_ran.fingerprint(model.parameters()) if ranks.parts == 1 else None
    if not full:
        model = models.add_lora(model, config.lora, policy, config.seed, start)
        if not machine.gpus and (fused := fused_lora.enable(model)):
            settings.append(Setting("LoRA", f"fused in {fused} layers", "no GPU for Unsloth's own fused kernels"))
    model = ranks.divide(model)
    if base_weights is None:
        base = (parameter for parameter in model.parameters() if full or not parameter.requires_grad)
        base_weights = what_ran.fingerprint(ranks.one_by_one(base))
    packed = config.train.packing is not False
    if packed:
        reporter.note("proving that rows of a pack do not see each other …")
    if packed and (reason := packing.enable(model, config.model.max_length)):
        packed = False
        config = configuration.changed(config, train={"packing": False})
        warnings.append(f"rows are padded, not packed: {reason}")
    settings.append(autoconfig.packing(packed, "proved on this model: rows in a pack do not see each other"))
    templated = chat.complete(tokenizer, config.data.chat_template)
    settings += [Setting("chat template", what, why) for what, why in templated]

    config = load.with_format(config)
    with ranks.node_first():
        data = load.encode(config, tokenizer, packed, reporter.progress)
    data.rank, data.ranks, data.in_step = ranks.rank, ranks.size, ranks.parts > 1
    total_steps = data.total_steps(config.train.epochs, config.train.max_steps)
    schedules.check(config.train, total_steps)
    if total_steps < (config.lora.refactor_every or 0):
        warnings.append(f"lora.refactor_every={config.lora.refactor_every}: never, the run has {total_steps} steps")
    config = in_steps(config, total_steps)
    if packed:
        reporter.note("proving that rows with the same beginning can share it …")
        why_not = packing.enable_shared(model, config.model.max_length)
        plan, brings = autoconfig.share(config, machine, plan, data, auto, why_not)
        config = configuration.changed(config, train={"micro_batch_rows": plan.micro_batch_rows})
        settings += brings
    with ranks.node_first():
        held_out, doubts = load.held_out(config, tokenizer, data, reporter.progress)
    load.check_held_out(config, held_out)
    warnings += doubts + load.nothing_split(data)
    measured = [row for rows in held_out.values() for row in rows]
    pretrained.check_tokens(tokenizer, len(model.get_input_embeddings().weight), load.texts(data, measured))
    settings += [Setting("data", line) for line in load.describe(data)]
    if measured:
        what = "rows" if data.unit == "rows" else "sequences" if config.data.cross_document else "parts of documents"
        settings.append(Setting("held out", f"loss of {len(measured):,} {what}, {_when(config)}"))
    run_folder.check_space(folder, needed_gib(config, models.trained_gib(model)))
    usd_per_hour, price = autoconfig.price_of(config, machine, ranks.size)
    settings += [price] if price else []
    if ranks.size > 1:
        settings.insert(0, Setting("processes", _processes(ranks, machine)))
    return Job(
        config=config,
        folder=folder,
        machine=machine,
        plan=plan,
        model=model,
        base_weights=base_weights,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        problems=evaluation.problems_of(config, tokenizer, data, warnings.append),
        total_steps=total_steps,
        usd_per_hour=usd_per_hour,
        settings=[*plan.settings, *settings],
        warnings=warnings,
        ranks=ranks,
    )


def _processes(ranks: Ranks, machine: Hardware) -> str:
    nodes = ranks.size // ranks.local_size
    text = f"{ranks.size} {'GPUs' if machine.gpus else 'on CPUs'}"
    return text + (f" on {nodes} machines" if nodes > 1 else "")


def fitted(config: Config, warn: Callable[[str], None], architecture: Any = None) -> tuple[Config, Any]:
    """The config, with no longer rows than the model has positions, and the model's architecture, unless it is given.

    Raises ConfigError where more were asked for, ModelError where the architecture cannot be read.
    """
    architecture = architecture or pretrained.read_architecture(config.model)
    most, asked = pretrained.positions(architecture), config.model.max_length
    if not most or asked <= most:
        return config, architecture
    told = f"model.max_length={asked:,} is more than the {most:,} positions of {config.model.name[:100]}"
    if "max_length" in config.model.model_fields_set:
        raise ConfigError([f"{told}: set it to {most} or less"])
    warn(f"{told}: {most:,} are used (set model.max_length to choose)")
    return configuration.changed(config, model={"max_length": most}), architecture


def in_steps(config: Config, total_steps: int) -> Config:
    """The config with every '10 %' written out as so many steps, of which the last is one."""
    shares = {name: share for name in ("eval", "checkpoint") if (share := getattr(config, name).share) is not None}
    every = {name: {"every": f"{max(1, math.floor(share * total_steps))} steps"} for name, share in shares.items()}
    return configuration.changed(config, **every)


def needed_gib(config: Config, trained_gib: float) -> float:
    """Disk for what is saved at the end and the checkpoints: weights and two moments each, one while it is written."""
    never = config.checkpoint.every == "never"
    kept = 3 if never else 3 * (config.checkpoint.keep + 1)  # a signal writes one even then
    kept += 3 if config.eval.keep_best or (config.eval.every_steps and not never) else 0
    return trained_gib * ((3 if config.lora.init in RESIDUAL else 1) + kept)  # its start, and twice the rank


def _when(config: Config) -> str:
    on_the_way = config.eval.every_steps is not None
    return f"at the start, every {config.eval.every} and at the end" if on_the_way else "at the start and at the end"
