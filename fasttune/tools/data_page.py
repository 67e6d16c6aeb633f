"""The page of `fasttune data`, on stderr. Text of the data cannot send control codes to the terminal."""

from collections.abc import Iterator
from pathlib import Path

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fasttune import terminal
from fasttune.data import files
from fasttune.report import steps_text
from fasttune.tools import inspect_tokens
from fasttune.tools.inspect_data import DataFigures, DataSet

WORTH_GROUPING = 0.1  # share of the tokens that train.group_by_prompt must save to be spoken of
PIECE_CHARACTERS = 1200  # of an uninterrupted piece of a row on the page; --json has all of it


def show(figures: DataFigures, console: Console = terminal.console) -> None:
    """Print the page: what becomes of each data set, lengths, padding, and rows with what is supervised set apart."""

    def heading(*words: str | tuple[str, str]) -> None:
        console.print(Rule(Text.assemble(*words), align="left", style="dim"))

    def indented(*part: RenderableType) -> None:
        console.print(Padding(Group(*part), (1, 2, 0, 2), expand=False))

    heading(("data ", "bold"), _visible(figures.name))
    indented(*_sets(figures))
    indented(*_histogram(figures, console.width))
    indented(*_layouts(figures))
    if figures.tokenization:
        indented(*inspect_tokens.lines(figures.tokenization, _visible))
    if not figures.shown:
        return
    console.print()
    heading(("rows as they are trained, the first of the run", "bold"))
    colour = console.color_system is not None and not console.no_color
    ways = [("", "", "dim"), ("", "", "bold green")] if colour else [("", "", ""), ("«", "»", "")]  # read, supervised

    def marked(text: str, supervised: bool) -> tuple[str, str]:
        before, after, style = ways[supervised]
        return f"{before}{text}{after}", style

    between = "  " if colour else " stands between these marks; all else is "
    indented(Text.assemble(marked("supervised", True), between, marked("only read", False)))
    for row in figures.shown:
        unit = "line" if files.kind(row.source) == "jsonl" else "row"
        unit = "sequence" if figures.layout == "concat" else unit
        place = f"{unit} {row.number:,} of {Path(row.source).name}"
        counts = f" · {row.tokens:,} tokens, {row.learned_tokens:,} supervised"
        text = Text.assemble(*(marked(_clip(piece), supervised) for piece, supervised in row.pieces))
        indented(Text.assemble((_visible(place), "bold"), counts), Padding(text, (0, 0, 0, 2), expand=False))


def _sets(figures: DataFigures) -> list[RenderableType]:
    """A paragraph a data set: what is trained of it, what was left out or cut, and why."""

    unit = _unit(figures)

    def tokens(each: DataSet | DataFigures) -> str:
        if figures.layout == "concat":  # all of them
            return f"{each.tokens:,} tokens"
        return f"{each.tokens:,} tokens, {each.learned_tokens:,} supervised ({each.learned_tokens / each.tokens:.1%})"

    lines: list[RenderableType] = []

    def under(text: str, style: str = "") -> None:
        lines.append(Padding(Text(_visible(text), style=style), (0, 0, 0, 2), expand=False))

    for each in figures.data_sets:
        often = f"  {each.weight:g} × an epoch" if each.weight != 1 else ""
        lines.append(Text.assemble((_visible(each.source), "bold"), (often, "dim")))
        held = f", {each.rows_held_out:,} of them held out" if each.rows_held_out else ""
        under(f"{each.rows_read:,} {unit}s read, {each.rows_kept:,} kept{held} · {tokens(each)}")
        for what, count in list(each.rows_with_unused.items())[:20]:
            under(f"{_rows(count)}: {what}", "dim")
        if each.files_not_read:
            under(f"not read: {', '.join(each.files_not_read[:8])}", "dim")
        losses = [f"{_rows(n)} ({n / each.rows_read:.1%}) {what}" for what, n in _losses(each, figures) if n]
        for text in (*losses, *_again(each, unit)):
            under(text, "yellow")
        if not losses:
            under(f"every {unit} is whole: none dropped, truncated or split", "dim")
    if len(figures.data_sets) > 1:
        lines.append(Text("together", style="bold"))
        under(f"{figures.rows:,} {unit}s kept · {tokens(figures)}")
    steps = f"{steps_text(figures.steps_per_epoch)} of {figures.rows_per_step:,}"
    rows = f"sequences of {figures.max_length_tokens:,} tokens" if figures.layout == "concat" else "rows"
    lines.append(Text(f"an epoch is {figures.rows_per_epoch:,} {rows}, in {steps}", style="dim"))
    lines += [Text(f"chat template: {what}: {why}", style="dim") for what, why in figures.template_changes]
    return lines + [Text(_visible(warning), style="yellow") for warning in figures.warnings]


def _again(each: DataSet, unit: str) -> Iterator[str]:
    """What is said of rows that come more than once."""

    def counted(rows: int, elsewhere: int) -> str:
        share = f"{rows:,} {unit}{'' if rows == 1 else 's'} ({rows / each.rows_read:.1%})"
        return share + (f", {elsewhere:,} of them of a data set above," if elsewhere else "")

    if each.rows_again:
        done = "left out: data.deduplicate" if each.rows_deduplicated else "data.deduplicate=true leaves them out"
        share = counted(each.rows_again, each.rows_again_elsewhere)
        what = "prompt and answer of an earlier row" if unit == "row" else "an earlier one"
        yield f"{share} repeat {what}; {done}"
    others = each.prompts_again - each.rows_again
    if others > 0:
        elsewhere = max(0, each.prompts_again_elsewhere - each.rows_again_elsewhere)
        yield f"{counted(others, elsewhere)} repeat the prompt of an earlier row with another answer"


def _losses(each: DataSet, figures: DataFigures) -> Iterator[tuple[str, int]]:
    """(what is lost, of how many rows)"""
    long = f"longer than model.max_length={figures.max_length_tokens:,} tokens (data.too_long={figures.too_long})"
    yield f"truncated: {long}", each.rows_truncated
    yield f"split into pieces: {long}", each.rows_split
    yield f"dropped: {long}", each.rows_too_long
    yield from ((f"dropped: {reason}", n) for reason, n in each.rows_dropped.items())
    yield from ((f"lost in the chat template: {what}", n) for what, n in each.rows_lost.items())
    yield from ((f"with a control token in a text: {token}", n) for token, n in each.rows_with_control_tokens.items())


def _unit(figures: DataFigures) -> str:
    """What is counted: with documents end to end a row of a step is a sequence."""
    return "document" if figures.layout == "concat" else "row"


def _histogram(figures: DataFigures, width: int) -> list[RenderableType]:
    lengths = figures.lengths
    quantiles = (
        f"shortest {lengths.shortest_tokens:,} · median {lengths.median_tokens:,.0f} · mean {lengths.mean_tokens:,.0f}"
        f" · p95 {lengths.p95_tokens:,.0f} · longest {lengths.longest_tokens:,}"
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    for side in ("right", "left", "right", "right"):
        table.add_column(justify=side, no_wrap=True)  # type: ignore[arg-type]
    counts = [each.rows for each in lengths.histogram]
    for each in lengths.histogram:
        bar = Bar(max(counts), 0, each.rows, width=max(10, min(48, width - 40)), color="cyan")
        first = f"{each.from_tokens:,}–" if each.to_tokens > each.from_tokens else ""
        share = Text(f"{each.rows / sum(counts):.1%}", style="dim")
        table.add_row(f"{first}{each.to_tokens:,}", bar, f"{each.rows:,}", share)
    return [Text(f"length of a {_unit(figures)} in tokens", style="bold"), Text(quantiles, style="dim"), table]


def _layouts(figures: DataFigures) -> list[RenderableType]:
    if figures.layout == "concat":
        seen = "all that stands before it" if figures.cross_document else "its own document only"
        told = "  none: documents lie end to end and are cut into sequences, in which a token sees "
        return [Text.assemble(("padding", "bold"), told + seen)]
    padding = figures.padding
    lines = [
        ("packed", f"{padding.packed_share:6.1%}", "of what is computed: rows lie end to end"),
        ("padded", f"{padding.padded_share:6.1%}", f"with train.packing=false: {_rows(padding.rows_at_once)} at once"),
    ]
    saved = 1 - padding.computed_tokens / padding.tokens
    if saved:
        counted = f"{padding.computed_tokens:,} computed of {padding.tokens:,} tokens"
        lines.append(("shared", f"{saved:6.1%}", f"of the tokens of packed rows, because they begin alike: {counted}"))
    if 1 - padding.grouped_share > saved + WORTH_GROUPING:
        told = "with train.group_by_prompt=true, where rows of one prompt come in one step"
        lines.append(("grouped", f"{1 - padding.grouped_share:6.1%}", told))
    runs = "on, once train has proved on the model that rows of a pack do not see each other"
    runs = "off: train.packing=false, rows will be padded" if figures.packing is False else runs
    first = f"  over the first {steps_text(padding.steps)} of a run on this machine"
    return [Text.assemble(("padding", "bold"), first), terminal.grid(lines), Text(f"packing is {runs}", style="dim")]


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _clip(text: str) -> str:
    """Both ends of a long piece, and how much is left out between them."""
    half = PIECE_CHARACTERS // 2
    out = len(text) - 2 * half
    if out <= half:
        return _visible(text)
    return f"{_visible(text[:half])} … [{out:,} characters] … {_visible(text[-half:])}"


def _visible(text: str) -> str:
    """Line breaks and tabs as they are; what would steer the terminal or cannot be seen, by its code."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)
