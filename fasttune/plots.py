"""Drawings: the plots of a run, and what draws any figure of ours as inline SVG or as PNG (the bench's bars too).

Colours are those of the light page. In SVG they become the page's CSS variables, so that one drawing suits both modes.
"""

import io
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fasttune import metrics
from fasttune.metrics import ExactMatch, HeldOut, StepMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 1000  # of one plot: more cannot be told apart on a screen and makes the file heavy
SMOOTH_FROM_STEPS = 20  # fewer points are readable as they are
DOTS_PER_INCH = 100  # of a PNG
# As templates/page.css.j2 has them, no two alike; but WARN is darker, because it is text on paper here.
PAPER, INK, SOFT, RULE = "#fcfcfb", "#1d2021", "#646a6d", "#dfe1e0"
ACCENT, PALE, BAD, WARN = "#1f6f8b", "#b4cfd8", "#b3372f", "#96690f"
VARIABLES = {PAPER: "paper", INK: "ink", SOFT: "soft", RULE: "rule"}
VARIABLES |= {ACCENT: "accent", PALE: "pale", BAD: "bad", WARN: "warn"}
# Text stays text, in the page's own font; the salt makes the same figure give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fasttune", "text.color": INK, "text.parse_math": False}


@contextmanager
def figure(width_in: float, height_in: float, font_size: float = 9) -> Iterator["Figure"]:
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


def plain_axes(axes: Any) -> None:
    """Only the line at the bottom, no ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(length=0, pad=5)


def line_plot(
    x: Sequence[int],
    lines: Sequence[Sequence[float]],
    from_zero: bool = False,
    width_in: float = 4.4,
    height_in: float = 2.0,
) -> str:
    """An SVG element with `lines` over `x`; the last line is the strong one, NaN leaves a gap."""
    with figure(width_in, height_in) as drawn:
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        axes = drawn.add_axes((0.5 / width_in, 0.3 / height_in, 1 - 0.55 / width_in, 1 - 0.4 / height_in))
        for i, line in enumerate(lines):
            strong = i == len(lines) - 1
            look = {"color": ACCENT, "linewidth": 1.6} if strong else {"color": PALE, "linewidth": 1.1}
            axes.plot(x, line, marker="o" if len(x) == 1 else "", **look)
        if from_zero:
            top = max((value for line in lines for value in line if math.isfinite(value)), default=0.0)
            axes.set_ylim(0, 1.12 * top or 1)
        plain_axes(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        return svg(drawn)


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
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %" if 0 <= value <= 100 else "")
        return svg(drawn)


def stride(steps: Sequence[StepMetrics]) -> int:
    """One of this many steps is drawn."""
    return max(1, math.ceil(len(steps) / MAX_POINTS))


def of_run(
    steps: Sequence[StepMetrics], held_out: HeldOut | None = None, answered: ExactMatch | None = None
) -> list[tuple[str, str, str]]:
    """(title, note, svg) of losses, speed and memory over the optimizer steps; nothing where no step finished."""
    if not steps:
        return []
    every = stride(steps)
    x = [step.step for step in steps[::every]]
    loss = [step.loss if math.isfinite(step.loss) else math.nan for step in steps]
    loss_lines, loss_note = [loss[::every]], "each step"
    if len(steps) >= SMOOTH_FROM_STEPS:
        window = max(3, len(steps) // 15)
        drawn = range(0, len(loss), every)
        loss_lines.append([statistics.fmean(loss[max(0, i - window + 1) : i + 1]) for i in drawn])
        loss_note = f"mean of the last {window} steps; pale: each step"
    plots = [("Loss", loss_note, line_plot(x, loss_lines, width_in=9.0, height_in=3.0))]

    seen = [(step.step, step.eval_loss) for step in steps if step.eval_loss is not None]
    if held_out is not None and len(seen) > 1:  # a curve: more than a start and an end
        seen = [(0, held_out.before.loss), *seen] if held_out.before else seen
        plots.append(("Held-out loss", f"{held_out.rows:,} held-out rows", _curve(seen)))
    right = [(step.step, step.eval_exact_match) for step in steps if step.eval_exact_match is not None]
    if answered is not None and right:
        right = [(0, answered.before), *right, (steps[-1].step, answered.after)]
        low, high = metrics.wilson(answered.after * answered.problems, answered.problems)
        note = f"share of {answered.problems:,} held-out problems; 95 % at the end: {low:.2f} to {high:.2f}"
        plots.append(("Right answers", note, _curve(right, from_zero=True)))

    condition = [(step.step, step.adapter_condition) for step in steps if step.adapter_condition is not None]
    if len(condition) > 1:
        note = "condition number of the worst factor, each time before the factors were balanced again"
        plots.append(("Adapter", note, _curve(condition)))

    counted = {step.step for step in metrics.steady(list(steps))}
    speed = [step.tokens_per_s for step in steps[::every]]
    steady = [step.tokens_per_s if step.step in counted else math.nan for step in steps[::every]]
    speed_note = "tokens/s without padding; " + ("pale: warm-up" if counted else "warm-up only")
    memory = [step.peak_memory_gib for step in steps[::every]]
    return [
        *plots,
        ("Speed", speed_note, line_plot(x, [speed, steady], from_zero=True)),
        ("Memory", "peak so far, GiB", line_plot(x, [memory], from_zero=True)),
    ]


def _curve(points: list[tuple[int, float]], from_zero: bool = False) -> str:
    return line_plot([x for x, _ in points], [[y for _, y in points]], from_zero)
