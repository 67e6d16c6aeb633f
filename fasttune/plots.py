"""The plots of a run as inline SVG: CSS variables for colours, so that one drawing suits light and dark pages."""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from fasttune import metrics
from fasttune.metrics import ExactMatch, HeldOut, StepMetrics

MAX_POINTS = 1000  # of one plot: more cannot be told apart on a screen and makes the file heavy
SMOOTH_FROM_STEPS = 20  # fewer points are readable as they are
# The light page's colours (templates/page.css.j2), which are its variables once a drawing is an SVG.
PAPER, INK, SOFT, RULE = "#fcfcfb", "#1d2021", "#646a6d", "#dfe1e0"
ACCENT, PALE, BAD, WARN = "#1f6f8b", "#b4cfd8", "#b3372f", "#96690f"
VARIABLES = {PAPER: "paper", INK: "ink", SOFT: "soft", RULE: "rule"}
VARIABLES |= {ACCENT: "accent", PALE: "pale", BAD: "bad", WARN: "warn"}


def stride(steps: Sequence[StepMetrics]) -> int:
    """One of this many steps is drawn."""
    return max(1, math.ceil(len(steps) / MAX_POINTS))


def of_run(
    steps: Sequence[StepMetrics], held_out: HeldOut | None = None, answered: ExactMatch | None = None
) -> list[tuple[str, str, str]]:
    """(title, note, svg) of losses, speed and memory over the optimizer steps; nothing where no step finished."""
    if not steps:
        return []
    number = [step.step for step in steps]
    loss = [step.loss if math.isfinite(step.loss) else math.nan for step in steps]
    speed = [step.tokens_per_s for step in steps]
    memory = [step.peak_memory_gib for step in steps]
    every = stride(steps)
    loss_lines, loss_note = [loss[::every]], "each step"
    if len(steps) >= SMOOTH_FROM_STEPS:
        window = max(3, len(steps) // 15)
        drawn = range(0, len(loss), every)
        loss_lines.append([statistics.fmean(loss[max(0, i - window + 1) : i + 1]) for i in drawn])
        loss_note = f"mean of the last {window} steps; pale: each step"
    counted = {step.step for step in metrics.steady(list(steps))}
    steady = [value if step in counted else math.nan for step, value in zip(number, speed, strict=True)]
    speed_note = "tokens/s without padding; " + ("pale: warm-up" if counted else "warm-up only")
    x = number[::every]
    return [
        ("Loss", loss_note, line_plot(x, loss_lines, width_in=9.0, height_in=3.0)),
        *_held_out(steps, held_out),
        *_exact_match(steps, answered),
        ("Speed", speed_note, line_plot(x, [speed[::every], steady[::every]], from_zero=True)),
        ("Memory", "peak so far, GiB", line_plot(x, [memory[::every]], from_zero=True)),
    ]


def _held_out(steps: Sequence[StepMetrics], held_out: HeldOut | None) -> list[tuple[str, str, str]]:
    """The held-out loss where there is a curve: more than a start and an end."""
    seen = [(step.step, step.eval_loss) for step in steps if step.eval_loss is not None]
    if held_out is None or len(seen) < 2:
        return []
    if held_out.before:
        seen.insert(0, (0, held_out.before.loss))
    note = f"{held_out.rows:,} held-out rows"
    return [("Held-out loss", note, line_plot([x for x, _ in seen], [[y for _, y in seen]]))]


def _exact_match(steps: Sequence[StepMetrics], answered: ExactMatch | None) -> list[tuple[str, str, str]]:
    """Right answers over the run, where they were looked at on the way."""
    seen = [(step.step, step.eval_exact_match) for step in steps if step.eval_exact_match is not None]
    if answered is None or not seen:
        return []
    seen = [(0, answered.before), *seen, (steps[-1].step, answered.after)]
    note = f"share of {answered.problems:,} held-out problems"
    return [("Right answers", note, line_plot([x for x, _ in seen], [[y for _, y in seen]], from_zero=True))]


def line_plot(
    x: Sequence[int],
    lines: Sequence[Sequence[float]],
    from_zero: bool = False,
    width_in: float = 4.4,
    height_in: float = 2.0,
) -> str:
    """An SVG element with `lines` over `x`; the last line is the strong one, NaN leaves a gap."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width_in, height_in))
        axes = figure.add_axes((0.5 / width_in, 0.3 / height_in, 1 - 0.55 / width_in, 1 - 0.4 / height_in))
        for i, line in enumerate(lines):
            strong = i == len(lines) - 1
            style = {"color": ACCENT, "linewidth": 1.6} if strong else {"color": PALE, "linewidth": 1.1}
            axes.plot(x, line, marker="o" if len(x) == 1 else "", **style)
        if from_zero:
            top = max((value for line in lines for value in line if math.isfinite(value)), default=0.0)
            axes.set_ylim(0, 1.12 * top or 1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.tick_params(length=0, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        return to_svg(figure)


def to_svg(figure: Any) -> str:
    """A matplotlib figure as an SVG element: text stays text in the page's own font, colours are the page's."""
    import matplotlib

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fasttune"}):  # the same run, the same file
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # the XML prolog names a DTD on the web
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
