"""The page of `fasttune plan`, on stderr: settings with their reasons, memory by part, tokens, time and dollars."""

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fasttune import terminal
from fasttune.forecast import span
from fasttune.preview import Figures
from fasttune.report import duration, rate, steps_text, usd

NEVER_ON_A_GPU = "counted, not fitted; never measured on a GPU"


def show(figures: Figures, console: Console = terminal.console) -> None:
    """Print the page."""
    console.print(Rule(Text.assemble(("plan ", "bold"), figures.name, (" on ", "dim"), figures.machine), align="left"))
    for table in (_settings(figures), _memory(figures), _bill(figures)):
        console.print(Padding(table, (1, 2, 0, 2), expand=False))
    if figures.fits:
        return
    console.print()
    needed = f"{figures.forecast.peak_memory_gib.expected:,.1f} GiB needed, {figures.usable_gib:,.1f} GiB can be used"
    console.print(Text.assemble(("does not fit: ", "bold red"), needed, "; try, in this order:"), soft_wrap=True)
    for way in figures.smaller:
        console.print(Text(f"  {way}"), soft_wrap=True)


def _settings(figures: Figures) -> Table:
    table = _table()
    for setting in figures.settings:
        value = Text(terminal.plain(setting.value))
        table.add_row(setting.name, value.append(f"  {terminal.plain(setting.reason or '')}", style="dim"))
    return table


def _memory(figures: Figures) -> Table:
    """A line for every part that is not nothing, and the peak."""
    table, expected = _table(), figures.forecast
    on_gpu = not expected.memory_gib.process
    for part, gib in vars(expected.memory_gib).items():
        if gib >= 0.005:
            table.add_row(part, Text(f"{gib:8.2f} GiB"))
    peak = Text(f"{expected.peak_memory_gib.expected:8.2f} GiB", style="bold")
    low, high = expected.peak_memory_gib.low, expected.peak_memory_gib.high
    note = f"  {low:,.1f} to {high:,.1f}; {figures.usable_gib:,.1f} can be used"
    note += f"; largest micro-batch {expected.largest_micro_batch_tokens:,} tokens"
    table.add_row("peak memory", peak.append(note + (f"; {NEVER_ON_A_GPU}" if on_gpu else ""), style="not bold dim"))
    return table


def _bill(figures: Figures) -> Table:
    table, expected = _table(), figures.forecast
    about = "  by the first rows of the data" if figures.sampled else ""
    table.add_row("tokens", Text(f"{expected.tokens:,} in {steps_text(expected.steps)}").append(about, style="dim"))
    if expected.tokens_per_s is None or expected.hours is None:
        table.add_row("time", Text("not known").append(f"  {expected.rate}", style="dim"))
        return table
    table.add_row("speed", Text(f"{span(expected.tokens_per_s, rate)} tokens/s").append(f"  {expected.rate}", "dim"))
    left_out = "  without evaluation" if expected.without_evaluation else ""
    table.add_row("time", Text(span(expected.hours, lambda hours: duration(3600 * hours))).append(left_out, "dim"))
    if expected.usd is None:
        table.add_row("cost", Text("not known").append("  no price: give --usd-per-hour", style="dim"))
    else:
        price = f"  at {usd(figures.usd_per_hour or 0)} an hour{left_out.replace('  ', ', ')}"
        table.add_row("cost", Text(span(expected.usd, usd)).append(price, style="dim"))
    return table


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
