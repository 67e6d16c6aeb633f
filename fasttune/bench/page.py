"""The page of `fasttune bench`, on stderr. Names and reasons are never read as markup."""

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fasttune import terminal
from fasttune.bench import report
from fasttune.bench.result import Bench
from fasttune.report import steps_text, usd
from fasttune.terminal import plain

FIRST_COLUMNS = 5  # of the upper table, where all columns in one would be too wide


def show(bench: Bench, folder: Path, console: Console = terminal.console) -> None:
    """Print the page: the table, what ran, parity, objections, the quote, and where the files are."""
    title = Text.assemble(("bench ", "bold"), plain(bench.name), (f"  {plain(report.machine(bench))}", "dim"))
    console.print(Rule(title, align="left", style="dim"))
    console.print(Padding(Text(f"{plain(bench.model)} · {report.job(bench)}", style="dim"), (0, 2)))
    for part in (_tables(bench, console), _failures(bench), _ran(bench), _parity(bench), _verdict(bench)):
        if part:
            console.print(Padding(Group(*part), (1, 2, 0, 2)))
    console.print()
    for name in ("bench.html", "bench.png", "bench.json"):  # a path must stay in one piece to be copied
        console.print(
            Text.assemble((f"{name.partition('.')[2]:<6}", "bold"), plain(str(folder / name))), soft_wrap=True
        )


def _tables(bench: Bench, console: Console) -> list[RenderableType]:
    table = report.table(bench)
    whole = _columns(table, range(len(table.headings)))
    shown: list[RenderableType] = [whole]
    if console.measure(whole).maximum > console.width - 4:
        cut = [range(FIRST_COLUMNS), range(FIRST_COLUMNS, len(table.headings))]
        shown = [_columns(table, cut[0]), Text(), _columns(table, cut[1])]
    note = "speeds count no padding; second line: range of the repeats, 95 % interval of a ratio"
    if bench.usd_per_hour is not None:
        note += f"; whole job: {bench.job_tokens:,} tokens at {usd(bench.usd_per_hour)} per hour"
    notes = [note, bench.limit_unknown] if bench.limit_unknown else [note]
    return [*shown, *(Text(text, style="dim") for text in notes)]


def _columns(table: report.Table, which: range) -> Table:
    made = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    made.add_column("", no_wrap=True)
    for i in which:
        heading = table.headings[i].rsplit(" ", 1)
        made.add_column("\n".join(heading), justify="right", vertical="top", no_wrap=True)
    for arm, cells in table.rows:
        values = [
            Text.assemble((cells[i].value, "bold red" if cells[i].bad else ""), (f"\n{cells[i].note}", "dim"))
            if cells[i].note
            else Text(cells[i].value, style="bold red" if cells[i].bad else "")
            for i in which
        ]
        made.add_row(Text(plain(arm.name), style="bold"), *values)
    return made


def _failures(bench: Bench) -> list[RenderableType]:
    return [
        Text.assemble((f"{plain(arm.name)} failed: ", "bold red"), plain(arm.failure))
        for arm in bench.arms
        if arm.failure
    ]


def _ran(bench: Bench) -> list[RenderableType]:
    lines = []
    for arm in bench.arms:
        if arm.repeats:
            ran = arm.repeats[-1].backend
            parts = [ran.library, f"attention {ran.attention}", ran.packing, f"{ran.patched_layers} layers patched"]
            parts += [f"checkpointing {ran.gradient_checkpointing}", ran.dtype, ran.optimizer]
            lines.append((arm.name, " · ".join(parts), ""))
    return [Text("what ran", style="bold underline"), terminal.grid(lines)] if lines else []


def _parity(bench: Bench) -> list[RenderableType]:
    """One line where all agree, else one for each comparison that does not."""
    comparisons = bench.comparisons
    if not comparisons:
        return []
    if bad := [each for each in comparisons if each.invalid]:
        return [
            Text.assemble(("INVALID ", "bold red"), f"{plain(each.arm)} against {plain(each.over)}: {each.invalid}")
            for each in bad
        ]
    largest = max(each.largest_loss_difference for each in comparisons)
    agree = f"agree within {report.difference(largest)} over {steps_text(bench.steps)}"
    tolerance = f"  tolerance {report.difference(comparisons[0].tolerance)}; same rows and tokens in every step"
    return [Text.assemble(("losses  ", "bold"), (agree, "green"), (tolerance, "dim"))]


def _verdict(bench: Bench) -> list[RenderableType]:
    style = "bold red" if not bench.valid else "bold yellow" if report.reasons_against(bench) else "bold"
    return [Text(plain(report.quote(bench)), style=style)]
