"""Drawings: the plots of a run, and what draws any figure of ours as inline SVG or as PNG (the bench's bars too).

Colours are those of the light page. In SVG they become the page's CSS variables, so that one drawing suits both modes.
"""

import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fasttune import metrics
from fasttune.metrics import ExactMatch, HeldOut, StepMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 1000  # of one plot: more cannot be told apart on a screen and makes the file heavy
SMOOTH_FROM_STEPS = 20  # fewer points are readable as they are
DOTS_PER_INCH = 100  # of a PNG
# The light ones of templates/page.css.j2, no two alike: in SVG they become the page's variables.
PAPER, INK, SOFT, RULE = "#fcfcfb", "#1d2021", "#5f6568", "#dfe1e0"
ACCENT, PALE, BAD, WARN = "#1f6f8b", "#7095a3", "#b3372f", "#8f640d"
VARIABLES = {PAPER: "paper", INK: "ink", SOFT: "soft", RULE: "rule"}
VARIABLES |= {ACCENT: "accent", PALE: "pale", BAD: "bad", WARN: "warn"}
# Of lines with a legend: told apart without colour too.
LOOKS = [(ACCENT, "-", "o"), (WARN, (0, (5, 2)), "s"), (BAD, (0, (1, 1.5)), "^"), (SOFT, (0, (6, 2, 1, 2)), "D")]
# Of a picture across a wide screen, and of one in a column or across a phone, where 358 CSS pixels are left of 390: a
# letter of FONT_POINTS is 12 of them high there (72 points an inch in SVG).
WIDE_IN, NARROW_IN, FONT_POINTS = 9.4, 3.7, 9.0
# Text stays text, in the page's own font; the salt makes the same figure give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fasttune", "text.color": INK, "text.parse_math": False}


@dataclass(frozen=True)
class Plot:
    """A picture of a page: `spoken` says its values, for those who do not see it; `wide` is for wide screens, or ""."""

    title: str
    note: str
    spoken: str
    narrow: str
    wide: str = ""


@contextmanager
def figure(width_in: float, height_in: float, font_size: float = FONT_POINTS) -> Iterator["Figure"]:
    """An empty figure, to be drawn on and turned into `svg` or `png` inside of the block."""
    import matplotlib  # about half a second, which only pages need
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.size": font_size}):
        yield Figure(figsize=(width_in, height_in), facecolor=PAPER)


def svg(drawn: "Figure") -> str:
    """A transparent SVG element."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # the XML prolog names a DTD on the web
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def png(drawn: "Figure") -> bytes:
    """The bytes of a PNG file, on paper."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def shorten(text: Any, room: float) -> None:
    """Cut a text of a figure, with an ellipsis, so that it ends before `room`, a share of the width of the figure."""
    words, end_px = text.get_text(), room * text.figure.bbox.width
    while (box := text.get_window_extent()).x1 > end_px and len(words) > 1:
        words = words[: min(len(words) - 1, int(len(words) * (end_px - box.x0) / box.width))]
        text.set_text(words.rstrip() + " …")


def plain_axes(axes: Any) -> None:
    """Only the line at the bottom, no ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(length=0, pad=5)


def line_plot(
    x: Sequence[int],
    lines: Sequence[Sequence[float]],
    from_zero: bool = False,
    width_in: float = NARROW_IN,
    height_in: float = 1.85,
) -> str:
    """An SVG element with `lines` over `x`; the last line is the strong one, NaN leaves a gap."""
    with figure(width_in, height_in) as drawn:
        axes = _roomy_axes(drawn)
        for i, line in enumerate(lines):
            strong = i == len(lines) - 1
            look = {"color": ACCENT, "linewidth": 1.6} if strong else {"color": PALE, "linewidth": 1.1}
            axes.plot(x, line, marker="o" if len(x) == 1 else "", **look)
        if from_zero:
            top = max((value for line in lines for value in line if math.isfinite(value)), default=0.0)
            axes.set_ylim(0, 1.12 * top or 1)
        axes.yaxis.set_major_locator(_round_numbers(5))
        axes.yaxis.set_major_formatter(lambda value, _: _number(value))
        return svg(drawn)


def _number(value: float) -> str:
    """1,500 or 0.25, and as learning rates are written 5e-5 and 1e-4."""
    if not 0 < abs(value) < 1e-3:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def log_plot(lines: Mapping[str, Sequence[float]], limit: float, width_in: float, height_in: float) -> str:
    """An SVG element with shares over the steps 1, 2, …, by name, on a log axis in percent, with a legend.

    A share of 0 has no place on it and leaves a gap; `limit` is marked over all steps.
    """
    with figure(width_in, height_in) as drawn:
        from matplotlib.ticker import LogLocator, NullLocator

        axes = _roomy_axes(drawn)
        for at, (name, line) in enumerate(lines.items()):
            colour, dashes, marker = LOOKS[at % len(LOOKS)]
            size = 1 - 0.2 * (at % len(LOOKS))  # where lines lie on each other, the lower ones are still seen
            look = {"color": colour, "linestyle": dashes, "linewidth": 2.4 * size, "marker": marker}
            shown = [value if value > 0 else math.nan for value in line]
            axes.plot(range(1, len(line) + 1), shown, label=name, markersize=7 * size, **look)
        axes.axhline(limit, color=INK, linewidth=1, linestyle=(0, (2, 2)), label=f"tolerance {_percent(limit)}")
        axes.set_yscale("log")
        least = min(value for line in lines.values() for value in line if value > 0)
        axes.set_ylim(10 ** math.floor(math.log10(least)), 1.5 * max(limit, *map(max, lines.values())))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: _percent(value))
        columns = max(1, round(width_in / 2.3))  # inches an entry
        drawn.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=3, borderpad=0)
        return svg(drawn)


def _percent(share: float) -> str:
    """Never as 1e-05."""
    return f"{100 * share:.10f}".rstrip("0").rstrip(".") + " %"


def _roomy_axes(drawn: "Figure") -> Any:
    """Axes over whole steps that leave their labels as much room as these need."""
    drawn.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03)
    axes = drawn.add_subplot()
    plain_axes(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.margins(x=0.02)
    per_inch = 1.6  # of labels as long as 100,000
    axes.xaxis.set_major_locator(_round_numbers(round(per_inch * drawn.get_figwidth()), integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return axes


def _round_numbers(at_most: int, **options: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=at_most, steps=[1, 2, 5, 10], **options)


def interval_plot(rows: Sequence[tuple[str, float, float, float, bool]], line: float | None, width_in: float) -> str:
    """An SVG element with a row for each (label, share, low end, high end, filled): a dot on its interval, in percent.

    line: a share that is marked over all rows, or None.
    """
    above_in, row_in, below_in = 0.08, 0.3, 0.3
    height_in = above_in + row_in * len(rows) + below_in
    ends = [100 * end for _, _, low, high, _ in rows for end in (low, high)] + ([] if line is None else [100 * line])
    with figure(width_in, height_in, font_size=10) as drawn:
        left, right = 0.3 / width_in, 0.22 / width_in
        axes = drawn.add_axes((left, below_in / height_in, 1 - left - right, row_in * len(rows) / height_in))
        if line is not None:
            axes.axvline(100 * line, color=WARN, linewidth=1.4, linestyle=(0, (4, 3)))
        for at, (_, share, low, high, filled) in enumerate(rows):
            axes.plot([100 * low, 100 * high], [at, at], color=ACCENT, linewidth=1.8, solid_capstyle="butt")
            look = {"markerfacecolor": ACCENT if filled else PAPER, "markeredgecolor": ACCENT, "markeredgewidth": 1.6}
            axes.plot([100 * share], [at], "o", markersize=7, **look)
        plain_axes(axes)
        margin = max(1.0, 0.06 * (max(ends) - min(ends)))
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %" if 0 <= value <= 100 else "")
        return svg(drawn)


def stride(steps: Sequence[StepMetrics]) -> int:
    """One of this many steps is drawn."""
    return max(1, math.ceil(len(steps) / MAX_POINTS))


def of_run(
    steps: Sequence[StepMetrics], held_out: HeldOut | None = None, answered: ExactMatch | None = None
) -> list[Plot]:
    """What a run was like over its optimizer steps, the loss first; nothing where no step finished."""
    if not steps:
        return []
    every = stride(steps)
    x = [step.step for step in steps[::every]]

    def over_steps(title: str, note: str, values: list[float], *pale: list[float], unit: str = "") -> Plot:
        """From zero, one of `every` values."""
        spoken = _spoken(title, list(zip([step.step for step in steps], values, strict=True)), unit)
        return Plot(title, note, spoken, line_plot(x, [line[::every] for line in (*pale, values)], from_zero=True))

    plots = [_loss(steps, x, every)]
    seen = [(step.step, step.eval_loss) for step in steps if step.eval_loss is not None]
    if held_out is not None and len(seen) > 1:  # a curve: more than a start and an end
        seen = [(0, held_out.before.loss), *seen] if held_out.before else seen
        plots.append(_curve("Held-out loss", f"{held_out.rows:,} held-out rows", seen))
    right = [(step.step, step.eval_exact_match) for step in steps if step.eval_exact_match is not None]
    if answered is not None and right:
        right = [(0, answered.before), *right, (steps[-1].step, answered.after)]
        low, high = metrics.wilson(answered.after * answered.problems, answered.problems)
        note = f"share of {answered.problems:,} held-out problems; 95 % at the end: {low:.2f} to {high:.2f}"
        plots.append(_curve("Right answers", note, right, from_zero=True))

    condition = [(step.step, step.adapter_condition) for step in steps if step.adapter_condition is not None]
    if len(condition) > 1:
        note = "condition number of the worst factor, each time before the factors were balanced again"
        plots.append(_curve("Adapter", note, condition))

    counted = {step.step for step in metrics.steady(list(steps))}
    speed = [step.tokens_per_s for step in steps]
    steady = [step.tokens_per_s if step.step in counted else math.nan for step in steps]
    speed_note = "tokens/s without padding; " + ("pale: warm-up" if counted else "warm-up only")
    norms = [_finite(step.grad_norm) for step in steps]
    plots.append(over_steps("Learning rate", "of each step", [step.learning_rate for step in steps]))
    plots.append(over_steps("Gradient norm", "of all trained weights, before it is clipped", norms))
    return [
        *plots,
        over_steps("Speed", speed_note, steady if counted else speed, speed, unit=" tokens/s"),
        over_steps("Memory", "peak so far, GiB", [step.peak_memory_gib for step in steps], unit=" GiB"),
    ]


def _loss(steps: Sequence[StepMetrics], x: list[int], every: int) -> Plot:
    loss = [_finite(step.loss) for step in steps]
    lines, note = [loss[::every]], "each step"
    if len(steps) >= SMOOTH_FROM_STEPS:
        window = max(3, len(steps) // 15)
        drawn = range(0, len(loss), every)
        lines.append([statistics.fmean(loss[max(0, i - window + 1) : i + 1]) for i in drawn])
        note = f"mean of the last {window} steps; pale: each step"
    spoken = _spoken("Loss", list(zip([step.step for step in steps], loss, strict=True)))
    wide = line_plot(x, lines, width_in=WIDE_IN, height_in=3.0)
    return Plot("Loss", note, spoken, line_plot(x, lines, height_in=2.3), wide)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _curve(title: str, note: str, points: list[tuple[int, float]], from_zero: bool = False) -> Plot:
    drawn = line_plot([x for x, _ in points], [[y for _, y in points]], from_zero)
    return Plot(title, note, _spoken(title, points), drawn)


def _spoken(title: str, points: list[tuple[int, float]], unit: str = "") -> str:
    """The ends and the extremes of a curve in words, for those who do not see it."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if not known:
        return f"{title}: no value that is finite"
    (first, at_first), (last, at_last) = known[0], known[-1]
    lowest, highest = min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])
    said = f"{title} over the optimizer steps: {_short(at_first)}{unit} at step {first:,}"
    if last > first:
        said += f", {_short(at_last)}{unit} at step {last:,}; lowest {_short(lowest[1])}{unit} at step {lowest[0]:,}"
        said += f", highest {_short(highest[1])}{unit} at step {highest[0]:,}"
    return said


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
