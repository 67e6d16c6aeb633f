"""A run on the terminal: notes, the panel, the progress, warnings and the final report. All of it on stderr.

Text that people or models wrote is never read as markup and cannot send control codes to the terminal.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from fasttune import next_steps
from fasttune.errors import one_line
from fasttune.metrics import RunResult, Setting, StepMetrics
from fasttune.report import MARKS, key_figures, rate, samples_note, steps_text, usd, what_ran

console = Console(stderr=True)  # stdout is for --json

RECENT_STEPS = 10  # whose median is the speed shown while running
PLAIN_LINE_EVERY_S = 10.0
SAMPLE_CHARACTERS = 600  # of one sample on the terminal; report.html has all of it
Shown = Literal["activity", "share", "steps"]
STATUS_STYLE = {"completed": "green", "interrupted": "red", "failed": "red"}


class TimeLeftColumn(TimeRemainingColumn):
    """Nothing until two updates tell a speed."""

    def render(self, task: Task) -> Text:
        return Text() if task.time_remaining is None else Text.assemble(super().render(task), " left")


class Reporter:
    """Everything a person sees of one run. `quiet` leaves only warnings and the line of a run that did not complete.

    Dollars count from the creation of the reporter, because the machine is paid for while the model loads.
    """

    def __init__(self, quiet: bool = False, console: Console = console):
        self._warned: set[str] = set()
        self._usd_per_hour: float | None = None  # comes with the machine
        self._quiet = quiet
        self._console = console
        # FORCE_COLOR makes rich believe in a terminal where there is a log file, which wants lines
        self._live = console.is_interactive and console.file.isatty()
        self._started_s = time.monotonic()
        self._total_steps = 0
        self._recent: deque[StepMetrics] = deque(maxlen=RECENT_STEPS)
        self._held_out: float | None = None  # loss, as seen last
        self._last_line_s = self._started_s
        self._progress: Progress | None = None
        self._shown: Shown | None = None  # by it
        self._prepared = ""  # what `progress` has named last
        self._task = TaskID(0)

    def note(self, text: str) -> None:
        """One pale line: a fact, or ending in "…" what is being done now, which a clock then follows on a terminal."""
        if self._quiet:
            return
        if self._shown != "steps":
            self.stop()
        self._line(Text(plain(text), style="dim"))
        if self._live and text.endswith("…") and self._shown is None:
            self._open_bar(
                "activity", SpinnerColumn(), TimeElapsedColumn(), total=None, transient=True, refresh_per_second=4
            )

    def progress(self, what: str, share: float) -> None:
        """How far a long preparation is, 0 to 1: a bar, or without a terminal a line every PLAIN_LINE_EVERY_S."""
        if self._quiet:
            return
        if share >= 1:
            self.stop()
        elif self._live and share > 0:
            bar = self._progress if self._shown == "share" else None
            bar = bar or self._open_bar(
                "share",
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=2)),
                TextColumn("{task.percentage:>3.0f} %"),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TimeLeftColumn(),
                SpinnerColumn(),
                total=1.0,
                transient=True,
                speed_estimate_period=math.inf,  # one measurement of a benchmark lasts minutes
            )
            bar.update(self._task, completed=share, description=plain(what))
        elif what != self._prepared or time.monotonic() - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s, self._prepared = time.monotonic(), what
            self.note(f"{what} …" + (f" {share:.0%}" if share else ""))

    def lines(self, named: Iterable[tuple[str, str]]) -> None:
        """Paths and commands with what they are: not in a table, since each must stay in one piece to be copied."""
        self.stop()
        for label, value in () if self._quiet else named:
            above = self._live and 9 + len(value) > self._console.width  # so that most commands fit into 60 columns
            heading = (f"{label}\n" if above else f"{label:<9}", "bold")
            self._console.print(Text.assemble(heading, plain(value)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning, once, above the bar; the final report has those of the result."""
        if text not in self._warned:
            self._warned.add(text)
            self._warning(text)

    def start(
        self,
        title: str,
        hardware_line: str,
        settings: list[Setting],
        total_steps: int,
        usd_per_hour: float | None = None,
        ranks: int = 1,
    ) -> None:
        """The panel: model, hardware, settings with the reason of each automatic one.

        ranks: processes of the run, whose steps are told of together.
        """
        self._total_steps, self._usd_per_hour, self._ranks = total_steps, usd_per_hour, ranks
        self.stop()
        if self._quiet:
            return
        table = grid([("hardware", hardware_line, ""), *((each.name, each.value, each.reason) for each in settings)])
        self._console.print(Panel(table, title=Text(plain(title), style="bold"), title_align="left", padding=(0, 1)))

    def training(self) -> None:
        """The steps begin: the progress bar."""
        if self._live and not self._quiet:
            counter = TextColumn("step {task.completed:,.0f}/{task.total:,.0f}")
            figures = TextColumn("{task.fields[figures]}")
            columns = SpinnerColumn(), counter, BarColumn(bar_width=None), figures  # steps may take minutes
            self._open_bar("steps", *columns, total=self._total_steps, refresh_per_second=4)
        elif not self._quiet:
            self._line(Text(f"training: {steps_text(self._total_steps)}"))

    def step(self, step: StepMetrics) -> None:
        """Show one finished optimizer step."""
        self._recent.append(step)
        self._held_out = self._held_out if step.eval_loss is None else step.eval_loss
        if self._quiet:
            return
        figures = self._figures(step)
        if self._progress is not None:
            room = self._console.width - 2 * len(f"{self._total_steps:,}") - 18  # for the counter and a bar to see
            text = _fit(figures, room)
            self._progress.update(self._task, completed=step.step, figures=text)
        elif self._line_is_due(step.step) or step.eval_loss is not None:
            self._last_line_s = time.monotonic()
            self._line(Text(" · ".join([f"step {step.step:,}/{self._total_steps:,}", *figures])))

    def _open_bar(self, shown: Shown, *columns: ProgressColumn, total: float | None, **options: Any) -> Progress:
        self.stop()
        self._shown, self._progress = shown, Progress(*columns, console=self._console, expand=True, **options)
        self._task = self._progress.add_task("", total=total, figures="first step …")
        _open.append(self)  # first: a signal may come at any moment
        self._progress.start()
        return self._progress

    def stop(self) -> None:
        """Close the bar. Safe at any time and more than once, so it belongs into a `finally`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._shown = None
            _open.remove(self)

    def finish(self, result: RunResult) -> None:
        """The final report: figures with what they count, what ran, samples, warnings and where the files are."""
        self.stop()
        status = Text(result.status, style=f"bold {STATUS_STYLE[result.status]}")
        if self._quiet:
            if result.status != "completed":
                why = one_line(result.error or "no reason given")
                self._line(Text.assemble(plain(result.name), ": ", status, ": ", why))
            return
        parts: list[RenderableType] = [Rule(Text.assemble(status, " ", plain(result.name)), align="left", style="dim")]
        if result.error:
            parts.append(Padding(Text(one_line(result.error), style="red"), (0, 2)))
        if result.ended_early:
            parts.append(Padding(Text(plain(result.ended_early)), (0, 2)))
        parts.append(Padding(_figure_table(result), (1, 2)))
        parts.extend(_samples(result))
        self._console.print(Group(*parts))
        for text in result.warnings:
            self._warning(text)
        self.lines([*_files(result), *next_steps.after_training(result)])

    def _figures(self, step: StepMetrics) -> list[str]:
        """The figures of the bar, the most wanted first: a narrow terminal drops the last ones."""
        recent = list(self._recent)[1:] or list(self._recent)  # the very first step warms up
        speed = statistics.median(each.tokens_per_s for each in recent)
        left_s = statistics.median(each.seconds for each in recent) * (self._total_steps - step.step)
        figures = [f"loss {step.loss:.3f}", f"{rate(speed)} tokens/s", f"{clock(left_s)} left"]
        if self._held_out is not None:
            figures.insert(1, f"held out {self._held_out:.3f}")
        if step.straggler is not None:
            figures.append(f"{rate(speed / self._ranks)} each, the slowest {step.straggler:.2f} × the mean time")
        figures.append(f"{step.peak_memory_gib:,.1f} GiB")
        if self._usd_per_hour is not None:
            figures.append(usd(self._usd_per_hour * (time.monotonic() - self._started_s) / 3600))
        return figures

    def _line_is_due(self, step: int) -> bool:
        every = max(1, self._total_steps // 20)
        overdue = time.monotonic() - self._last_line_s >= PLAIN_LINE_EVERY_S
        return len(self._recent) == 1 or step == self._total_steps or step % every == 0 or overdue

    def _warning(self, text: str) -> None:
        self._line(Text.assemble(("warning: ", "bold yellow"), plain(text)))

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._live)  # a log keeps one line one line


_open: list[Reporter] = []  # those with a bar


def close() -> None:
    """Close every bar that is open, as before the message of an error."""
    for reporter in list(_open):
        reporter.stop()


def clock(seconds: float) -> str:
    """Seconds as 0:07, 2:41 or 1:05:09: as narrow as a bar needs them."""
    minutes, rest_s = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest_s:02d}" if minutes >= 60 else f"{minutes}:{rest_s:02d}"


def _fit(parts: list[str], width: int) -> str:
    """As many of the first parts as fit into `width` columns; at least one."""
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts = parts[:-1]
    return " · ".join(parts)


def plain(text: str) -> str:
    """`text` without control characters: a model's answer must not be able to steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t " else "�" for c in text)


def grid(lines: Iterable[tuple[str, str | Text, str | None]]) -> Table:
    """A line each: name, value, and a pale note. Text of people or models is not read as markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, max_width=28)
    table.add_column(overflow="fold")
    for name, value, note in lines:
        text = Text(plain(value)) if isinstance(value, str) else value
        dash = " – " if str(text).strip() else ""  # without colour nothing else tells where the note begins
        table.add_row(Text(plain(name)), Text.assemble(text, (f"{dash}{plain(note)}" if note else "", "dim")))
    return table


def under_names(
    groups: Mapping[str, Sequence[Sequence[Text]]], sides: str, width: int, headings: Sequence[str] = ()
) -> Group:
    """Rows below the name they belong to, which has a line of its own: no width breaks it. All columns are aligned.

    sides: l or r for each column. width: of the page; where it is too narrow the first column is broken.
    """
    head = [Text(heading, style="dim") for heading in headings]
    rows = [*([head] if head else []), *(row for of_name in groups.values() for row in of_name)]
    columns = zip(*rows, strict=True)
    widths = [max(cell_len(line) for cell in cells for line in cell.plain.split("\n")) for cells in columns]
    indent, between = 2, len(sides) - 1
    gap = 2 if indent + sum(widths) + 2 * between <= width else 1
    if widths:
        widths[0] = min(widths[0], max(12, width - indent - sum(widths[1:]) - gap * between))

    def table(of_name: Iterable[Sequence[Text]]) -> Padding:
        made = Table.grid(padding=(0, gap, 0, 0))
        for side, column_width in zip(sides, widths, strict=False):
            made.add_column(width=column_width, justify="right" if side == "r" else "left")
        for row in of_name:
            made.add_row(*row)
        return Padding(made, (0, 0, 0, indent), expand=False)

    parts: list[RenderableType] = [table([head])] if head else []
    for name, of_name in groups.items():
        parts += [Text(plain(name), style="bold", overflow="fold"), table(of_name)]
    return Group(*parts)


def _figure_table(result: RunResult) -> Table:
    lines: list[tuple[str, str | Text, str]] = [
        (figure.label, Text(figure.value, style="dim") if figure.value == "not known" else figure.value, figure.note)
        for figure in key_figures(result)
    ]
    return grid([*lines, ("what ran", " · ".join(f"{label} {value}" for label, value in what_ran(result)), "")])


def _samples(result: RunResult) -> Iterator[RenderableType]:
    """Held-out prompts with the answers before and after, side by side."""
    if note := samples_note(result):
        yield Padding(Text(note), (0, 2, 1, 2))
    for sample in result.samples:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
        for name, right in (("before", sample.before_right), ("after", sample.after_right)):
            table.add_column(f"{name} {MARKS[right]}".strip(), ratio=1, overflow="fold")
        table.add_row(_clip(sample.before), _clip(sample.after))
        prompt = Text.assemble(("held-out prompt: ", "bold"), _clip(sample.prompt))
        reference = Text.assemble(("reference: ", "bold"), _clip(sample.reference), style="dim")
        yield Padding(Group(prompt, table, reference), (0, 2, 1, 2))


def _clip(text: str) -> Text:
    text = plain(text.strip())
    return Text(text if len(text) <= SAMPLE_CHARACTERS else text[: SAMPLE_CHARACTERS - 1] + "…")


def _files(result: RunResult) -> Iterator[tuple[str, str]]:
    """What the run left behind: only files that are there."""
    output = Path(result.output_dir)
    for label, name in (("adapter", "adapter"), ("model", "model"), ("report", "report.html"), ("numbers", "run.json")):
        if (output / name).exists():
            yield label, str(output / name)
    if result.resume_command:
        yield "resume", result.resume_command
    for name, loader in (("adapter", "peft.AutoPeftModelForCausalLM"), ("model", "transformers.AutoModelForCausalLM")):
        if (output / name).exists():
            yield "load it", f'{loader}.from_pretrained("{output / name}")'
