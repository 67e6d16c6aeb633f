"""`fasttune plan`: what a run would choose, need and cost, on this machine or another. Trains nothing.

    show(look(config.load("configs/quickstart.yaml"), "h100-80", terminal.Reporter()))            # on stderr

Of the model only config.json and the tokenizer are read (without the hub: known_models.py), of the data the first rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fasttune import chips, hardware, terminal
from fasttune.config import Config
from fasttune.core import autoconfig, prepare, pretrained, remedies
from fasttune.core.memory import Shape
from fasttune.core.ranks import divided_is_asked_for
from fasttune.data import chat, load, sources
from fasttune.errors import ConfigError
from fasttune.hardware import Hardware
from fasttune.metrics import Forecast, Roofline, Setting
from fasttune.report import rate, steps_text, usd
from fasttune.settings import TOKENS, looks_like_hub
from fasttune.system import library_log
from fasttune.tools import estimate, known_models, scaling
from fasttune.tools.estimate import span
from fasttune.tools.scaling import Scaling

SAMPLED_ROWS = sources.BUILTIN_ROWS["train"]  # of each source; a built-in one would make more if it were asked for them
ON_A_GPU = "fitted to two runs on an H100, 6 % too high on a third"


@dataclass(frozen=True)
class Figures:
    """Everything the page shows. sampled: the data is larger than what was read, so tokens and steps are scaled."""

    name: str
    machine: str
    usable_gib: float
    fits: bool
    settings: list[Setting]
    forecast: Forecast
    sampled: bool
    usd_per_hour: float | None
    smaller: list[str]  # what to change where it does not fit
    at_most: bool = False  # the run may end before its last step: train.early_stopping_patience
    scaling: Scaling | None = None  # of several GPUs with a model each; all else is of one of them


def look(config: Config, gpu: str | None, reporter: terminal.Reporter, ranks: int = 1, nodes: int = 1) -> Figures:
    """The plan of a config. `gpu`: one of chips.KNOWN_GPUS, or None for this machine. ranks: GPUs of all `nodes`.

    Raises ConfigError, DataError and ModelError.
    """
    if gpu is not None and gpu not in chips.KNOWN_GPUS:
        raise ConfigError([f"--gpu {gpu}: is not known; one of {', '.join(chips.KNOWN_GPUS)}"])
    prepare.check_sources_and_model(config)
    here = hardware.detect()
    machine = here if gpu is None else chips.with_gpu(here, gpu)
    autoconfig.check_paged(config, machine, needs_package=False)
    try:
        with library_log():
            reporter.note(f"reading the architecture and the tokenizer of {config.model.name} …")
            architecture, tokenizer, assumed = known_models.read(config.model)
            config, architecture = prepare.fitted(config, reporter.warn, architecture)
            chat.complete(tokenizer, config.data.chat_template)
            parts = ranks if divided_is_asked_for() else 1
            chosen = autoconfig.resolve(config, machine, Shape.of(architecture), parts)
            auto, config = config.train.micro_batch_rows == "auto", chosen.apply(config)
            sample, scale = _sample(config)
            data = load.encode(sample, tokenizer, chosen.packed, reporter.progress)
            data.ranks = ranks
            load.held_out(sample, tokenizer, data, reporter.progress)  # which may be refused, too
            if assumed.tokens is None:
                pretrained.check_tokens(tokenizer, chosen.shape.vocab, load.texts(data))
            brings = list[Setting]()
            if chosen.packed:
                chosen, brings = autoconfig.share(config, machine, chosen, data, auto)
            usd_per_hour, price = autoconfig.price_of(config, machine, ranks)
            expected = estimate.of_run(sample, chosen, data, machine, usd_per_hour, scale)
            expected = known_models.scaled(expected, assumed.tokens)
            several = scaling.of_run(config, chosen, data, nodes, expected) if ranks > parts else None
    finally:
        reporter.stop()
    usable_gib = autoconfig.usable_memory_gib(machine)
    fits = expected.peak_memory_gib.expected <= usable_gib
    packing = autoconfig.packing(chosen.packed, "where the live model proves to be exact")
    return Figures(
        name=config.name,
        machine=hardware.machine_name(machine),
        usable_gib=usable_gib,
        fits=fits,
        settings=[
            *assumed.settings,
            *chosen.settings,
            packing,
            *brings,
            _attention(machine, chosen.packed),
            *filter(None, [price]),
        ],
        forecast=expected,
        sampled=scale != 1,
        usd_per_hour=usd_per_hour,
        smaller=[] if fits else remedies.smaller(config, bool(machine.gpus)),
        at_most=config.train.early_stopping_patience is not None,
        scaling=several,
    )


def _attention(machine: Hardware, packed: bool) -> Setting:
    if machine.gpus:
        reason = "Flash Attention where it works; `fasttune verify` and a run say which ran"
        return Setting("attention", "Unsloth's choice", reason)
    if packed:
        return Setting("attention", "rows of a pack, one by one", "no GPU")
    return Setting("attention", "torch's own (SDPA)", "no GPU, rows are padded")


def _sample(config: Config) -> tuple[Config, float]:
    """The config with no more than SAMPLED_ROWS of each source, and how many times as many rows an epoch has."""
    most = config.data.max_rows
    whole = read = 0.0
    for source, weight in config.data.sources.items():
        rows = _rows_of(source, config.data.split, config.data.documents)
        whole += weight * (rows if most is None else min(rows, most))
        read += weight * min(rows, SAMPLED_ROWS, most or SAMPLED_ROWS)
    hub = any(looks_like_hub(source) for source in (*config.data.sources, config.data.eval or ""))
    fewer: dict[str, Any] = {"redraw": False}  # one draw is as long as another
    if whole != read or hub:  # past the check of the settings, which lets nobody stream data.eval alone
        fewer |= {"max_rows": min(most or SAMPLED_ROWS, SAMPLED_ROWS), "streaming": hub}
    return config.model_copy(update={"data": config.data.model_copy(update=fewer)}), whole / read


def _rows_of(source: str, split: str, documents: str | None) -> int:
    """Rows of a source: counted as far as SAMPLED_ROWS, then by the share of the file that they are; of a hub set what
    the hub says, without downloading it. Raises DataError.
    """
    if looks_like_hub(source):
        from fasttune.data import arrow

        return arrow.rows_of(source, split)
    if source.endswith(TOKENS):
        from fasttune.data import megatron

        return len(megatron.read(source))
    rows = 0
    for chunk in sources.read(source, "train", split, documents=documents):
        rows += len(chunk)
        if rows >= SAMPLED_ROWS:
            return round(rows / chunk.done)
    return rows


def show(figures: Figures, console: Console = terminal.console) -> None:
    """Print the page: settings with their reasons, memory by part, tokens, time and dollars."""
    console.print(Rule(Text.assemble(("plan ", "bold"), figures.name, (" on ", "dim"), figures.machine), align="left"))
    settings = terminal.grid((each.name, each.value, each.reason) for each in figures.settings)
    tables = [settings, terminal.grid(_memory(figures)), terminal.grid(_bill(figures))]
    tables += [terminal.grid(scaling.lines(figures.scaling))] if figures.scaling else []
    for table in (*tables, *_groups(figures.forecast.roofline)):
        console.print(Padding(table, (1, 2, 0, 2), expand=False))
    if figures.fits:
        return
    needed = f"{figures.forecast.peak_memory_gib.expected:,.1f} GiB needed, {figures.usable_gib:,.1f} GiB can be used"
    console.print(Text.assemble("\n", ("does not fit: ", "bold red"), needed, "; try, in this order:"), soft_wrap=True)
    for way in figures.smaller:
        console.print(Text(f"  {way}"), soft_wrap=True)


def _memory(figures: Figures) -> list[tuple[str, str | Text, str]]:
    """A line for every part that is not nothing, and the peak."""
    expected, peak = figures.forecast, figures.forecast.peak_memory_gib
    note = f"{peak.low:,.1f} to {peak.high:,.1f}; {figures.usable_gib:,.1f} can be used"
    note += f"; largest micro-batch {expected.largest_micro_batch_tokens:,} tokens"
    note += "" if expected.memory_gib.process else f"; {ON_A_GPU}"  # Python counts on a CPU only
    parts = {part: gib for part, gib in vars(expected.memory_gib).items() if gib >= 0.005}
    peak_line = ("peak memory", Text(f"{peak.expected:8.2f} GiB", style="bold"), note)
    return [*((part, f"{gib:8.2f} GiB", "") for part, gib in parts.items()), peak_line]


def _groups(roofline: Roofline | None) -> Iterator[Table]:
    """A line for each group of kernels of a step, the longest first; none where that cannot be said."""
    if roofline is None:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("kernels of a step", "TFLOP", "GB", "ms", "bound by"):
        table.add_column(name, justify="right" if name in ("TFLOP", "GB", "ms") else "left")
    for each in sorted(roofline.groups, key=lambda each: -each.ms):
        figures = (each.flops / 1e12, each.bytes / 1e9, each.ms)
        table.add_row(each.name, *(f"{figure:,.1f}" if figure else "" for figure in figures), each.bound)
    speed = f"{rate(roofline.tokens_per_s)} tokens/s; {roofline.assumed}"
    table.add_row("together", "", "", Text(f"{roofline.ms:,.1f}", style="bold"), Text(speed, style="dim"))
    yield table


def _bill(figures: Figures) -> list[tuple[str, str, str]]:
    expected = figures.forecast
    about = "by the first rows of the data" if figures.sampled else ""
    at_most = "at most " if figures.at_most else ""
    lines = [("tokens", f"{at_most}{expected.tokens:,} in {steps_text(expected.steps)}", about)]
    if expected.tokens_per_s is None or expected.hours is None:
        return [*lines, ("time", "not known", expected.rate)]
    left_out = "without evaluation" if expected.without_evaluation else ""
    lines.append(("speed", f"{span(expected.tokens_per_s, rate)} tokens/s", expected.rate))
    lines.append(("time", at_most + span(expected.hours, estimate.hours_text), left_out))
    if expected.usd is None:
        return [*lines, ("cost", "not known", "no price: give --usd-per-hour")]
    price = f"at {usd(figures.usd_per_hour or 0)} an hour{', ' if left_out else ''}{left_out}"
    return [*lines, ("cost", at_most + span(expected.usd, usd), price)]
