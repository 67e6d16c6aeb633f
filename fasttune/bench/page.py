"""A benchmark for people: one sentence, the table, and a page on the terminal.

A sink: it knows the result types and nothing of how they were measured. Names and reasons are never read as markup.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fasttune import terminal
from fasttune.bench.stats import MIN_REPEATS, Arm, Bench
from fasttune.report import duration, percent, rate, steps_text, usd
from fasttune.terminal import plain


@dataclass(frozen=True)
class Cell:
    """One value of the table, ready to print; `note` is its range or interval. `bad` values are no numbers."""

    value: str
    note: str = ""
    bad: bool = False

    def text(self) -> Text:
        note = f"\n{self.note}" if self.note else ""
        return Text.assemble((self.value, "bold red" if self.bad else ""), (note, "dim"))


def quote(bench: Bench) -> str:
    """The one sentence a person can quote, with its conditions; "not a claim" and why, where it would not be true."""
    if reasons := reasons_against(bench):
        return f"not a claim: {'; '.join(reasons)}"
    arm, baseline, over = bench.arm(bench.fastest), bench.arm(bench.baseline), bench.over_baseline[bench.fastest]
    assert arm and baseline
    repeats = min(len(arm.repeats), len(baseline.repeats))
    speed = rate(arm.median("tokens_per_s") or 0)
    many, plainly = (f"{arm.name}, ", f"that of {baseline.name}") if bench.scales else ("", "plain Hugging Face")
    parts = [
        f"fasttune trains {bench.model} ({job(bench)}) at {speed} tokens/s on {many}{machine(bench)}",
        f"{over.ratio:.2f}× {plainly} (95 % interval {over.low:.2f} to {over.high:.2f}, {repeats} repeats)",
    ]
    if bench.scales:
        parts.append(f"an efficiency of {percent(bench.efficiency(arm) or 0)}")
    if share := bench.share_of_limit(arm):
        parts.append(f"{percent(share)} of the measured matmul limit")
    price = bench.usd_per_million(arm)
    if price is not None and bench.usd_per_hour is not None:
        parts.append(f"{usd(price)} per million tokens at {usd(bench.usd_per_hour)} an hour")
    return f"{', '.join(parts)}; losses agree within {difference(over.largest_loss_difference)}"


def reasons_against(bench: Bench) -> list[str]:
    """Why the numbers are no claim of fasttune over the baseline; empty where they are one."""
    return [*(f"INVALID: {reason}" for reason in bench.invalid), *doubts(bench)]


def doubts(bench: Bench) -> list[str]:
    """What stands against a claim beside what is INVALID."""
    found = []
    for name in (bench.fastest, bench.baseline):
        arm = bench.arm(name)
        if arm is None:
            found.append(f"{name} was not measured")
        elif not arm.repeats:
            found.append(f"{name} failed: {arm.failure}")
        elif len(arm.repeats) < MIN_REPEATS:
            count = len(arm.repeats)
            found.append(f"{count} repeat{'' if count == 1 else 's'}, fewer than {MIN_REPEATS}")
    return list(dict.fromkeys([*found, *bench.objections]))


def job(bench: Bench) -> str:
    """What every arm did, e.g. "LoRA, bfloat16, max length 4,096, 8 rows a step"."""
    rows = f"{bench.batch_rows:,} row{'' if bench.batch_rows == 1 else 's'} a step"
    return f"{bench.method}, {bench.dtype}, max length {bench.max_length:,}, {rows}"


def machine(bench: Bench) -> str:
    """The hardware in a few words."""
    facts = bench.hardware
    if facts["gpus"]:
        return f"{facts['gpus'][0]['name']} ({facts['gpus'][0]['memory_gib']:.0f} GiB)"
    return f"{facts['cpu_model']} ({facts['cores']} cores, no GPU)"


def difference(relative: float) -> str:
    """How far losses differ at most, relative, with two digits: 0.012 %; a smaller one than 0.0001 % as that."""
    return "0.0001 %" if 0 < relative < 1e-6 else f"{float(f'{100 * relative:.2g}'):g} %"


def table(bench: Bench) -> dict[str, list[Cell]]:
    """Heading → a cell of every arm, also of one that failed; only columns that say something about this benchmark."""
    rows = [_row(bench, arm) for arm in bench.arms]
    said = [heading for heading in rows[0] if any(row[heading].value != "–" for row in rows)]
    return {heading: [row[heading] for row in rows] for heading in said}


def _row(bench: Bench, arm: Arm) -> dict[str, Cell]:
    def cell(value: float | None, text: Callable[[float], str], note: str = "") -> Cell:
        return Cell("–" if value is None else text(value), note)

    median, gib = arm.median, "{:,.2f}".format
    speeds, speed = arm.values("tokens_per_s"), Cell("failed", bad=True)
    if speeds:
        note = f"{rate(min(speeds))}–{rate(max(speeds))}" if len(speeds) > 1 else "1 repeat"
        speed = cell(median("tokens_per_s"), rate, note)
    ratio = Cell("1", "baseline") if arm.name == bench.baseline and speeds else Cell("–")
    if over := bench.over_baseline.get(arm.name):
        ratio = Cell(f"{over.ratio:.2f}", f"{over.low:.2f}–{over.high:.2f}" if len(speeds) > 1 else "1 repeat")
        ratio = Cell("INVALID", bad=True) if over.invalid else ratio
    shared = any(sum(one.computed_tokens) < sum(one.tokens) for each in bench.arms for one in each.repeats) or None
    hours, price = bench.job_hours(arm), bench.usd_per_hour
    whole = Cell("–") if hours is None or price is None else Cell(duration(3600 * hours), usd(hours * price))
    return {
        "tokens/s": speed,
        f"× {bench.baseline}": ratio,
        "a process": cell((speeds and bench.scales and (median("tokens_per_s") or 0) / arm.processes) or None, rate),
        "efficiency": cell(bench.efficiency(arm) if bench.scales else None, percent),
        "straggler": cell(median("straggler"), "{:.2f}".format),
        "computed/s": cell(shared and median("computed_tokens_per_s"), rate),
        "loss tokens/s": cell(median("loss_tokens_per_s"), rate),
        "s a step": cell(median("step_s"), lambda s: f"{s:,.3g}" if s < 100 else f"{s:,.0f}"),
        "padding": cell(median("padding_fraction"), percent),
        "peak GiB": cell(median("peak_memory_gib"), gib),
        "GiB before": cell(arm.larger_before_gib, gib),
        "W": cell(median("power_w"), "{:,.0f}".format),
        "s to first step": cell(median("seconds_to_first_step"), "{:,.1f}".format),
        "of limit": cell(bench.share_of_limit(arm), percent),
        "MFU": cell(bench.mfu(arm), percent),
        "$ / M tokens": cell(bench.usd_per_million(arm), usd),
        "whole job": whole,
    }


def show(bench: Bench, folder: Path, console: Console = terminal.console) -> None:
    """Print the page on stderr: the table, what ran, parity, objections, the quote, and where the files are."""
    title = Text.assemble(("bench ", "bold"), plain(bench.name), (f"  {plain(machine(bench))}", "dim"))
    console.print(Rule(title, align="left", style="dim"))
    console.print(Padding(Text(f"{plain(bench.model)} · {job(bench)}", style="dim"), (0, 2)))
    failures = _red([(f"{arm.name} failed: ", arm.failure) for arm in bench.arms if arm.failure])
    style = "bold red" if bench.invalid else "bold yellow" if doubts(bench) else "bold"
    verdict: list[RenderableType] = [Text(plain(quote(bench)), style=style)]
    parts = [_tables(bench, console), failures, _ran(bench), _parity(bench), verdict]
    for part in filter(None, parts):
        console.print(Padding(Group(*part), (1, 2, 0, 2)))
    console.print()
    for name in ("bench.html", "bench.png", "bench.json"):  # a path must stay in one piece to be copied
        line = Text.assemble((f"{name.partition('.')[2]:<6}", "bold"), plain(str(folder / name)))
        console.print(line, soft_wrap=True)


def _red(lines: list[tuple[str, str]]) -> list[RenderableType]:
    return [Text.assemble((plain(red), "bold red"), plain(text)) for red, text in lines]


def _tables(bench: Bench, console: Console) -> list[RenderableType]:
    """All columns, in as many tables below each other as the width asks for: none is cut."""
    rows, shown = list[list[tuple[str, list[Cell]]]]([[]]), list[RenderableType]()
    for column in table(bench).items():
        if rows[-1] and console.measure(_columns(bench, [*rows[-1], column])).maximum > console.width - 4:
            rows.append([])
        rows[-1].append(column)
    for columns in rows:
        shown += [*([Text()] if shown else []), _columns(bench, columns)]
    note = "speeds count no padding; second line: range of the repeats, 95 % interval of a ratio"
    if bench.usd_per_hour is not None:
        note += f"; whole job: {bench.job_tokens:,} tokens at {usd(bench.usd_per_hour)} per hour"
    return [*shown, *(Text(text, style="dim") for text in (note, bench.limit_unknown) if text)]


def _columns(bench: Bench, columns: list[tuple[str, list[Cell]]]) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    made.add_column("", no_wrap=True)
    for heading, _ in columns:
        made.add_column("\n".join(heading.rsplit(" ", 1)), justify="right", vertical="top", no_wrap=True)
    for i, arm in enumerate(bench.arms):
        made.add_row(Text(plain(arm.name), style="bold"), *(column[i].text() for _, column in columns))
    return made


def _ran(bench: Bench) -> list[RenderableType]:
    lines = []
    for arm in filter(lambda arm: arm.repeats, bench.arms):
        ran = arm.repeats[-1].backend
        parts = [ran.library, f"attention {ran.attention}", ran.packing, f"{ran.patched_layers} layers patched"]
        parts += [f"checkpointing {ran.gradient_checkpointing}", ran.dtype, ran.optimizer]
        lines.append((arm.name, " · ".join(parts), ""))
    return [Text("what ran", style="bold underline"), terminal.grid(lines)] if lines else []


def _parity(bench: Bench) -> list[RenderableType]:
    """One line where all agree, else one for each comparison that does not."""
    if bench.invalid or not bench.comparisons:
        return _red([("INVALID ", reason) for reason in bench.invalid])
    largest = max(each.largest_loss_difference for each in bench.comparisons)
    agree = f"agree within {difference(largest)} over {steps_text(bench.steps)}"
    tolerance = f" – tolerance {difference(bench.comparisons[0].tolerance)}; same rows and tokens in every step"
    return [Text.assemble(("losses  ", "bold"), (agree, "green"), (tolerance, "dim"))]
