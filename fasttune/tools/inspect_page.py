"""The page of `fasttune data`, on stderr: figures, and rows with what is learned coloured apart from what is only read.

Text of the data is never read as markup and cannot send control codes to the terminal.
"""

from pathlib import Path

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fasttune import terminal
from fasttune.data import sources
from fasttune.report import steps_text
from fasttune.tools.inspect_data import DataSet, Figures, Lengths, Row

PIECE_CHARACTERS = 1200  # of an uninterrupted piece of a row on the page; --json has all of it
LEARNED_STYLE, READ_STYLE = "bold green", "dim"
LEARNED_MARKS = "«", "»"  # where there is no colour


def show(figures: Figures, console: Console = terminal.console) -> None:
    """Print the page."""
    colour = console.color_system is not None and not console.no_color
    console.print(Rule(Text.assemble(("data ", "bold"), _visible(figures.name)), align="left", style="dim"))
    for part in (_sets(figures), _histogram(figures.lengths, console.width), _padding(figures)):
        console.print(Padding(Group(*part), (1, 2, 0, 2), expand=False))
    if not figures.shown:
        return
    console.print()
    console.print(Rule(Text("rows as they are trained, the first of the run", style="bold"), align="left", style="dim"))
    console.print(Padding(_legend(colour), (1, 2, 0, 2), expand=False))
    for row in figures.shown:
        console.print(Padding(Group(*_row(row, colour)), (1, 2, 0, 2), expand=False))


def _legend(colour: bool) -> Text:
    learned, read = _marked("learned", True, colour), _marked("only read", False, colour)
    if colour:
        return Text.assemble(learned, "  ", read)
    return Text.assemble(learned, " stands between these marks; all else is only read")


def _row(row: Row, colour: bool) -> list[RenderableType]:
    place = f"{'line' if sources.kind(row.source) == 'jsonl' else 'row'} {row.number:,} of {Path(row.source).name}"
    counts = f" · {row.tokens:,} tokens, {row.learned_tokens:,} learned"
    text = Text.assemble(*(_marked(_clip(piece), learned, colour) for piece, learned in row.pieces))
    return [Text.assemble((_visible(place), "bold"), counts), Padding(text, (0, 0, 0, 2), expand=False)]


def _sets(figures: Figures) -> list[RenderableType]:
    """A paragraph a data set: what is trained of it, what was left out or cut, and why."""
    lines: list[Text] = []
    for each in figures.data_sets:
        often = f"  {each.weight:g} × an epoch" if each.weight != 1 else ""
        lines.append(Text.assemble((_visible(each.source), "bold"), (often, "dim")))
        held = f", {each.rows_held_out:,} of them held out" if each.rows_held_out else ""
        read = f"  {each.rows_read:,} rows read, {each.rows_kept:,} kept{held}"
        lines.append(Text(f"{read} · {_tokens(each.tokens, each.learned_tokens)}"))
        losses = _losses(each, figures)
        unused = [f"{n:,} row{'' if n == 1 else 's'}: {what}" for what, n in each.rows_with_unused.items()][:20]
        lines += [Text(f"  {_visible(text)}", style="dim") for text in unused]
        lines += [Text(f"  {_visible(loss)}", style="yellow") for loss in losses]
        if not losses:
            lines.append(Text("  every row is whole: none dropped, truncated or split", style="dim"))
    if len(figures.data_sets) > 1:
        lines.append(Text("together", style="bold"))
        lines.append(Text(f"  {figures.rows:,} rows kept · {_tokens(figures.tokens, figures.learned_tokens)}"))
    steps = f"{steps_text(figures.steps_per_epoch)} of {figures.rows_per_step:,}"
    lines.append(Text(f"an epoch is {figures.rows_per_epoch:,} rows, in {steps}", style="dim"))
    lines += [Text(f"chat template: {what}: {why}", style="dim") for what, why in figures.template_changes]
    lines += [Text(_visible(warning), style="yellow") for warning in figures.warnings]
    return [*lines]


def _tokens(tokens: int, learned: int) -> str:
    return f"{tokens:,} tokens, {learned:,} learned ({learned / tokens:.1%})"


def _losses(each: DataSet, figures: Figures) -> list[str]:
    long = f"longer than model.max_length={figures.max_length_tokens:,} tokens (data.too_long={figures.too_long})"
    found = [
        (each.rows_truncated, f"truncated: {long}"),
        (each.rows_split, f"split into pieces: {long}"),
        (each.rows_too_long, f"dropped: {long}"),
        *((n, f"dropped: {reason}") for reason, n in each.rows_dropped.items()),
        *((n, f"lost in the chat template: {what}") for what, n in each.rows_lost.items()),
        *((n, f"with a control token in a text: {token}") for token, n in each.rows_with_control_tokens.items()),
    ]
    return [f"{n:,} row{'' if n == 1 else 's'} ({n / each.rows_read:.1%}) {what}" for n, what in found if n]


def _histogram(lengths: Lengths, width: int) -> list[RenderableType]:
    title = Text("length of a row in tokens", style="bold")
    quantiles = Text(
        f"shortest {lengths.shortest_tokens:,} · median {lengths.median_tokens:,.0f} · mean {lengths.mean_tokens:,.0f}"
        f" · p95 {lengths.p95_tokens:,.0f} · longest {lengths.longest_tokens:,}",
        style="dim",
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    most = max(each.rows for each in lengths.histogram)
    rows = sum(each.rows for each in lengths.histogram)
    for each in lengths.histogram:
        bar = Bar(most, 0, each.rows, width=max(10, min(48, width - 40)), color="cyan")
        span = (
            f"{each.from_tokens:,}–{each.to_tokens:,}" if each.to_tokens > each.from_tokens else f"{each.to_tokens:,}"
        )
        table.add_row(span, bar, f"{each.rows:,}", Text(f"{each.rows / rows:.1%}", style="dim"))
    return [title, quantiles, table]


def _padding(figures: Figures) -> list[RenderableType]:
    padding = figures.padding
    padded = f"with train.packing=false: {padding.rows_at_once:,} row{'s' * (padding.rows_at_once > 1)} at once"
    lines = [
        ("packed", f"{padding.packed_share:6.1%}", "of what is computed: rows lie end to end"),
        ("padded", f"{padding.padded_share:6.1%}", padded),
    ]
    runs = "off: train.packing=false, rows will be padded"
    if figures.packing is not False:
        runs = "on, once train has proved on the model that rows of a pack do not see each other"
    first = steps_text(padding.steps)
    title = Text.assemble(("padding", "bold"), f"  over the first {first} of a run on this machine")
    return [title, terminal.grid(lines), Text(f"packing is {runs}", style="dim")]


def _marked(text: str, learned: bool, colour: bool) -> tuple[str, str]:
    if colour:
        return text, LEARNED_STYLE if learned else READ_STYLE
    return (f"{LEARNED_MARKS[0]}{text}{LEARNED_MARKS[1]}" if learned else text), ""


def _clip(text: str) -> str:
    """Both ends of a long piece, and how much is left out between them."""
    half = PIECE_CHARACTERS // 2
    out = len(text) - 2 * half
    return (
        f"{_visible(text[:half])} … [{out:,} characters] … {_visible(text[-half:])}" if out > half else _visible(text)
    )


def _visible(text: str) -> str:
    """Line breaks and tabs as they are; what would steer the terminal or cannot be seen, by its code."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)
