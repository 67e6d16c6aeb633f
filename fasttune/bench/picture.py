"""The bars of a benchmark: where they lie (for the page), and bench.png, a picture that can be shown alone."""

import io
import textwrap
from dataclasses import dataclass
from typing import Any

from fasttune.bench.result import BASELINE, FASTEST, Arm, Bench, Comparison
from fasttune.report import rate

SIZE_PX = (1200, 630)  # what sites expect of a picture that stands for a page
INSIDE_FROM = 0.6  # of the axis: a longer bar has its words inside
LIMIT_IN_VIEW = 4.0  # a limit further away than so many of the longest bars would leave the bars unreadable
PAPER, INK, SOFT, RULE = "#fcfcfb", "#1d2021", "#646a6d", "#dfe1e0"  # the light page's
ACCENT, PALE, BAD, WARN = "#1f6f8b", "#b4cfd8", "#b3372f", "#96690f"


@dataclass(frozen=True)
class Bars:
    """The right end of the axis in tokens/s, and whether the limit lies on it."""

    top: float
    limit_in_view: bool

    def share(self, tokens_per_s: float) -> float:
        """Where a speed lies on the axis, in percent of its length."""
        return round(100 * tokens_per_s / self.top, 3)


def bars(bench: Bench) -> Bars:
    longest = max((value for arm in bench.arms for value in arm.values("tokens_per_s")), default=1.0)
    in_view = bench.limit is not None and bench.limit.tokens_per_s <= LIMIT_IN_VIEW * longest
    return Bars(1.02 * max(longest, bench.limit.tokens_per_s if bench.limit and in_view else 0.0), in_view)


def png(bench: Bench, title: str, conditions: str, verdict: str, good: bool) -> bytes:
    """Bars of the medians, the range of the repeats as interval, each repeat as a dot, the limit as a line.

    title, conditions: above the bars; verdict: below them, in red if not `good`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 15, "font.family": "DejaVu Sans", "text.color": INK, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(SIZE_PX[0] / 100, SIZE_PX[1] / 100), dpi=100, facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.19, 0.2, 0.77, 0.61), facecolor=PAPER)
        view = bars(bench)
        over = {each.arm: each for each in bench.comparisons if each.over == BASELINE}
        for at, arm in enumerate(bench.arms):
            _bar(axes, at, arm, view, over.get(arm.name))
        _axes(axes, bench, view)
        figure.text(0.035, 0.925, textwrap.shorten(title, 68, placeholder=" …"), fontsize=23, fontweight="bold")
        figure.text(0.035, 0.87, textwrap.shorten(conditions, 125, placeholder=" …"), fontsize=13, color=SOFT)
        lines = "\n".join(textwrap.wrap(verdict, 130 if good else 115, max_lines=2, placeholder=" …"))
        look = {"color": INK} if good else {"color": BAD, "fontweight": "bold"}
        figure.text(0.035, 0.1, lines, va="top", fontsize=12.5, linespacing=1.5, **look)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def _bar(axes: Any, at: int, arm: Arm, view: Bars, over: Comparison | None) -> None:
    values, median = arm.values("tokens_per_s"), arm.median("tokens_per_s")
    if median is None:
        reason = textwrap.shorten(f"failed: {arm.failure}", 85, placeholder=" …")
        axes.text(0.012 * view.top, at, reason, va="center", fontsize=13, color=BAD)
        return
    strong = arm.name == FASTEST
    axes.barh(at, median, height=0.56, color=ACCENT if strong else PALE)
    axes.plot([min(values), max(values)], [at, at], color=INK, linewidth=1.4)
    axes.plot(values, [at] * len(values), "o", markersize=6, color=INK, markerfacecolor=PAPER, markeredgewidth=1.2)
    ratio = "" if over is None else "   INVALID" if over.invalid else f"   {over.ratio:.2f}×"
    inside = min(values) > INSIDE_FROM * view.top  # else the words would run over the dots
    axes.text(
        0.012 * view.top + (0 if inside else max(values)),
        at,
        f"{rate(median)} tokens/s{ratio}",
        va="center",
        color=PAPER if strong and inside else INK,
        fontweight="bold" if strong else "normal",
    )


def _axes(axes: Any, bench: Bench, view: Bars) -> None:
    axes.set_ylim(len(bench.arms) - 0.4, -0.75)
    axes.set_xlim(0, view.top)
    axes.set_yticks(range(len(bench.arms)), [textwrap.shorten(arm.name, 20, placeholder="…") for arm in bench.arms])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(length=0, pad=8)
    axes.tick_params(axis="x", labelsize=12, labelcolor=SOFT)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=6)
    if bench.limit is None:
        return
    label = f"measured matmul limit {rate(bench.limit.tokens_per_s)}"
    at = bench.limit.tokens_per_s if view.limit_in_view else view.top
    if view.limit_in_view:
        axes.axvline(at, color=WARN, linewidth=2, linestyle=(0, (5, 3)))
    label += " " if view.limit_in_view else " (outside) →"
    axes.text(at, -0.62, label, ha="right", va="center", fontsize=13, color=WARN)
