"""A benchmark as files: bench.json, bench.html and bench.png.

A sink: it knows the result types and nothing of how they were measured. Names and reasons are never read as markup.
"""

import math
import textwrap
from pathlib import Path
from typing import Any

from fasttune import metrics, plots, report
from fasttune.bench.page import difference, doubts, job, machine, quote, reasons_against, table
from fasttune.bench.stats import BASELINE, WARMUP_STEPS, Arm, Bench
from fasttune.report import rate, steps_text

SIZE_IN = (12.0, 6.3)  # of bench.png: 1200 × 630, what sites expect of a picture that stands for a page
PNG_POINTS = 15  # letters of it
BAR_IN = 0.46  # from one bar to the next in bench.html
LIMIT_IN_VIEW = 4.0  # a limit further away than so many of the longest bars would leave the bars unreadable


def write(bench: Bench, folder: Path) -> None:
    """Write bench.json, bench.html and bench.png, each atomically. Raises OutputError where it cannot."""
    report.write_json(folder / "bench.json", bench.as_dict())
    png, wide, narrow = picture(bench)
    report.write_bytes(folder / "bench.png", png)
    bars = plots.Plot("", "", spoken(bench), narrow, wide)
    said = {"quote": quote(bench), "doubts": doubts(bench), "machine": machine(bench), "table": table(bench)}
    drawn = {"bars": bars, "losses": losses(bench)}
    facts = {"hardware": report.facts(bench.hardware), "versions": bench.versions.items()}
    fixed = {"flops_formula": metrics.FLOPS_FORMULA, "warmup_steps": WARMUP_STEPS}
    words = {"rate": rate, "difference": difference, "steps_text": steps_text}
    page = report.fill("bench.html.j2", bench=bench, **said, **drawn, **facts, **fixed, **words)
    report.write_text(folder / "bench.html", page)


def picture(bench: Bench) -> tuple[bytes, str, str]:
    """bench.png, which can be shown alone, and the same bars as an SVG element for a wide screen and for a phone."""
    with plots.figure(*SIZE_IN, font_size=PNG_POINTS) as figure:
        _words(figure, bench)
        _bars(figure, (0.035, 0.2, 0.93, 0.62), bench, PNG_POINTS)
        alone = plots.png(figure)
    high = BAR_IN * (len(bench.arms) + (0.7 if bench.sound_limit else 0.1))  # bars
    below = 0.28  # the numbers of their axis

    def bars_in(width_in: float) -> str:
        with plots.figure(width_in, high + below) as figure:
            _bars(figure, (0.01, below / (high + below), 0.93, high / (high + below)), bench, plots.FONT_POINTS)
            return plots.svg(figure)

    return alone, bars_in(plots.WIDE_IN), bars_in(plots.NARROW_IN)


def _bars(figure: Any, place: tuple[float, ...], bench: Bench, points: float) -> None:
    """For each arm a line of words and below it a bar, so that no spread of the repeats can push words anywhere."""
    axes, arms = figure.add_axes(place, facecolor="none"), len(bench.arms)
    longest = max((value for arm in bench.arms for value in arm.values("tokens_per_s")), default=1.0)
    limit = bench.sound_limit.tokens_per_s if bench.sound_limit else 0.0
    in_view = limit <= LIMIT_IN_VIEW * longest
    axes.set_ylim(arms - 0.55, -1.2 if bench.sound_limit else -0.6)
    axes.set_xlim(0, 1.02 * max(longest, limit if in_view else 0.0))
    plots.plain_axes(axes)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelcolor=plots.SOFT, labelsize=max(plots.FONT_POINTS, 0.85 * points))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.locator_params(axis="x", nbins=round(figure.get_figwidth()))
    row_points = 72 * place[3] * figure.get_figheight() / (arms + 0.7)
    beside: dict[str, Any] = {"fontsize": min(points, 0.42 * row_points), "va": "center"}
    for at, arm in enumerate(bench.arms):
        _bar(axes, at, arm, bench)
        strong, failed = arm.name == bench.fastest, not arm.repeats
        look = {"color": plots.BAD if failed else plots.INK, "fontweight": "bold" if strong else "normal"}
        words = axes.text(0, at - 0.28, line(bench, arm), transform=axes.get_yaxis_transform(), **beside, **look)
        plots.shorten(words, place[0] + place[2])
    if bench.sound_limit:
        said = f"dashed: measured matmul limit {rate(limit)} tokens/s"
        said = said if in_view else f"measured matmul limit {rate(limit)} tokens/s (outside) →"
        left = 0.0 if in_view else 1.0
        look = {"color": plots.WARN, "ha": "right" if left else "left"}
        axes.text(left, -0.95, said, transform=axes.get_yaxis_transform(), **beside, **look)


def _short(per_s: float) -> str:
    """At most as long as 999,999, so that half of it has its place beside the axis."""
    if per_s >= 1e6:
        return f"{per_s / 1e6:,.4g} M"
    return f"{per_s:,.0f}" if per_s >= 1000 else f"{per_s:.4g}"


def line(bench: Bench, arm: Arm) -> str:
    """An arm in one line: its name, its speed, and its ratio over the baseline or why there is none."""
    median, over = arm.median("tokens_per_s"), bench.over_baseline.get(arm.name)
    if median is None:
        return f"{arm.name}   failed: {arm.failure}"
    ratio = "" if over is None else "   INVALID" if over.invalid else f"   {over.ratio:.2f}×"
    return f"{arm.name}   {rate(median)} tokens/s{ratio}"


def _bar(axes: Any, at: int, arm: Arm, bench: Bench) -> None:
    """The median as a bar, the range of the repeats as a line, each repeat as a dot; the limit as a dashed line."""
    centre, high = at + 0.18, 0.38
    values, median = arm.values("tokens_per_s"), arm.median("tokens_per_s")
    if bench.sound_limit and median is not None:  # not across the words
        ends = [centre - high / 2, centre + high / 2]
        axes.plot([bench.sound_limit.tokens_per_s] * 2, ends, color=plots.WARN, linewidth=2, linestyle=(0, (2, 1)))
    if median is None:
        return
    axes.barh(centre, median, height=high, color=plots.ACCENT if arm.name == bench.fastest else plots.PALE)
    axes.plot([min(values), max(values)], [centre, centre], color=plots.INK, linewidth=1.4)
    dots = {"color": plots.INK, "markerfacecolor": plots.PAPER, "markeredgewidth": 1.2, "markersize": 5}
    axes.plot(values, [centre] * len(values), "o", **dots)


def spoken(bench: Bench) -> str:
    """The bars in words."""
    said = []
    for arm in bench.arms:
        values = arm.values("tokens_per_s")
        between = f" ({rate(min(values))} to {rate(max(values))})" if len(values) > 1 else ""
        said.append(" ".join(line(bench, arm).split()) + between)
    limit = [f"measured matmul limit {rate(bench.sound_limit.tokens_per_s)}"] if bench.sound_limit else []
    return f"Speed, median of the repeats: {'; '.join([*said, *limit])}"


def loss_differences(bench: Bench) -> dict[str, list[float]]:
    """Arm → how far its loss is from the baseline's, step by step: |Δ loss| over the loss, the largest of any repeats.

    Arms whose losses cannot be compared step by step are left out.
    """
    over = bench.arm(bench.baseline)
    found = {}
    for arm in bench.arms:
        pairs = [(a.losses, b.losses) for a in arm.repeats for b in (over.repeats if over else [])]
        alike = len({len(losses) for pair in pairs for losses in pair}) == 1
        if arm is not over and alike and all(math.isfinite(loss) for pair in pairs for each in pair for loss in each):
            apart = [[abs(x - y) / max(abs(y), 1e-12) for x, y in zip(*pair, strict=True)] for pair in pairs]
            found[arm.name] = [max(of_step) for of_step in zip(*apart, strict=True)]
    return found


def losses(bench: Bench) -> plots.Plot | None:
    """`loss_differences` as a picture; None where nothing was compared, without lines where nothing differs."""
    apart = loss_differences(bench)
    if not apart:
        return None
    equal = [name for name, values in apart.items() if not any(values)]
    drawn = {name: line for name, line in apart.items() if any(line)}
    said = [
        f"{name} at most {difference(max(line))}, at step {line.index(max(line)) + 1}" for name, line in drawn.items()
    ]
    said += [f"{name} none in any step" for name in equal]
    note = f"|Δ loss| ÷ loss of {bench.baseline}, each optimizer step, the largest of the repeats; log axis"
    note += "; no point where nothing differs" if any(0 in line for line in drawn.values()) else ""
    note += f"; equal to the last bit: {', '.join(equal)}" if equal else ""
    title, narrow, wide = f"Difference from {bench.baseline}", "", ""
    if drawn:
        tolerance = bench.comparisons[0].tolerance
        narrow, wide = (
            plots.log_plot(drawn, tolerance, width_in, 2.6) for width_in in (plots.NARROW_IN, plots.WIDE_IN)
        )
    return plots.Plot(title, note, f"{title}: {'; '.join(said)}", narrow, wide)


def _words(figure: Any, bench: Bench) -> None:
    """Title and conditions above the bars, the verdict below them, in red where they are no claim."""
    left, right = 0.035, 0.965
    title = f"Training speed of {bench.model.rpartition('/')[2]}"
    conditions = f"{job(bench)} · {machine(bench)} · {bench.date}"
    look = {"color": plots.BAD, "fontweight": "bold"}
    verdict = quote(bench)
    if not reasons_against(bench):
        look = {"color": plots.INK}
        what = "The same run" if bench.scales else f"{BASELINE}: plain Hugging Face"
        verdict = (
            f"Tokens a second without padding, median of the repeats; dots: each repeat. {what}, same rows in the same "
            f"order; losses agree within {difference(bench.over_baseline[bench.fastest].largest_loss_difference)}."
        )
    first, *rest = textwrap.wrap(verdict, 110)
    for text in (
        figure.text(left, 0.925, title, fontsize=23, fontweight="bold"),
        figure.text(left, 0.87, conditions, fontsize=13, color=plots.SOFT),
        figure.text(left, 0.1, first, va="top", fontsize=12.5, **look),
        figure.text(left, 0.06, " ".join(rest), va="top", fontsize=12.5, **look),
    ):
        plots.shorten(text, right)
