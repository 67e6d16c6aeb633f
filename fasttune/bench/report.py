"""A benchmark as files (bench.json, bench.html, bench.png), as one sentence, and the table that page and terminal show.

A sink: it knows the result types and nothing of how they were measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fasttune import metrics, plots, report
from fasttune.bench import picture
from fasttune.bench.result import BASELINE, FASTEST, MIN_REPEATS, WARMUP_STEPS, Arm, Bench, Comparison, usd_per_million
from fasttune.report import duration, percent, rate, usd


@dataclass(frozen=True)
class Cell:
    """One value of the table, ready to print; `note` is its range or interval. `bad` values are no numbers."""

    value: str
    note: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """A heading and a cell of each arm per column; only columns that say something about this benchmark."""

    headings: list[str]
    rows: list[tuple[Arm, list[Cell]]]


def write(bench: Bench, folder: Path) -> None:
    """Write bench.json, bench.html and bench.png, each atomically. Raises OutputError where it cannot."""
    report.write_json(folder / "bench.json", bench.as_dict())
    report.write_bytes(folder / "bench.png", _png(bench))
    from markupsafe import Markup

    curves = loss_curves(bench)
    svg = plots.line_plot(list(range(1, len(curves[0]) + 1)), curves, width_in=9.0, height_in=2.6) if curves else None
    page = report.fill(
        "bench.html.j2",
        bench=bench,
        quote=quote(bench),
        reasons=reasons_against(bench),
        table=table(bench),
        comparisons=bench.comparisons,
        bars=picture.bars(bench),
        losses=Markup(svg) if svg else None,
        machine=machine(bench),
        flops_formula=metrics.FLOPS_FORMULA,
        warmup_steps=WARMUP_STEPS,
        hardware=report.facts(bench.hardware),
        versions=bench.versions.items(),
        rate=rate,
        difference=difference,
        steps_text=report.steps_text,
    )
    report.write_text(folder / "bench.html", page)


def quote(bench: Bench) -> str:
    """The one sentence a person can quote, with its conditions; "not a claim" and why, where it would not be true."""
    if reasons := reasons_against(bench):
        return f"not a claim: {'; '.join(reasons)}"
    arm, plain = bench.arm(FASTEST), bench.arm(BASELINE)
    over = next(c for c in bench.comparisons if (c.arm, c.over) == (FASTEST, BASELINE))
    assert arm and plain
    speed = arm.median("tokens_per_s")
    assert speed
    repeats = min(len(arm.repeats), len(plain.repeats))
    parts = [
        f"fasttune trains {bench.model} ({job(bench)}) at {rate(speed)} tokens/s on {machine(bench)}",
        f"{over.ratio:.2f}× plain Hugging Face (95 % interval {over.low:.2f} to {over.high:.2f}, {repeats} repeats)",
    ]
    if share := bench.share_of_limit(arm):
        parts.append(f"{percent(share)} of the measured matmul limit")
    price = usd_per_million(speed, bench.usd_per_hour)
    if price is not None and bench.usd_per_hour is not None:
        parts.append(f"{usd(price)} per million tokens at {usd(bench.usd_per_hour)} an hour")
    return f"{', '.join(parts)}; losses agree within {difference(over.largest_loss_difference)}"


def reasons_against(bench: Bench) -> list[str]:
    """Why the numbers are no claim of fasttune over the baseline; empty where they are one."""
    found = [f"INVALID: {c.arm} against {c.over}: {c.invalid}" for c in bench.comparisons if c.invalid]
    for name in (FASTEST, BASELINE):
        arm = bench.arm(name)
        if arm is None:
            found.append(f"{name} was not measured")
        elif not arm.repeats:
            found.append(f"{name} failed: {arm.failure}")
        elif len(arm.repeats) < MIN_REPEATS:
            found.append(f"{len(arm.repeats)} repeats, fewer than {MIN_REPEATS}")
    return list(dict.fromkeys([*found, *bench.objections]))


def job(bench: Bench) -> str:
    """What every arm did, e.g. "LoRA, bfloat16, max length 4,096, 8 rows a step"."""
    rows = f"{bench.batch_rows:,} row{'' if bench.batch_rows == 1 else 's'} a step"
    return ", ".join([bench.method, bench.dtype, f"max length {bench.max_length:,}", rows])


def machine(bench: Bench) -> str:
    """The hardware in a few words."""
    facts = bench.hardware
    if facts["gpus"]:
        gpu = facts["gpus"][0]
        return f"{gpu['name']} ({gpu['memory_gib']:.0f} GiB)"
    return f"{facts['cpu_model']} ({facts['cores']} cores, no GPU)"


def difference(relative: float) -> str:
    """A relative difference of losses with two digits: 0.012 %."""
    return "under 0.0001 %" if 0 < relative < 1e-6 else f"{float(f'{100 * relative:.2g}'):g} %"


def table(bench: Bench) -> Table:
    """Every arm, also one that failed, with everything that was measured of it."""
    over = {c.arm: c for c in bench.comparisons if c.over == BASELINE}
    columns: list[tuple[str, Callable[[Arm], Cell]]] = [
        ("tokens/s", lambda arm: _spread(arm, "tokens_per_s", rate)),
        (f"× {BASELINE}", lambda arm: _ratio(arm, over.get(arm.name))),
        ("loss tokens/s", lambda arm: _median(arm, "loss_tokens_per_s", rate)),
        ("s a step", lambda arm: _median(arm, "step_s", lambda s: f"{s:,.3g}" if s < 100 else f"{s:,.0f}")),
        ("padding", lambda arm: _median(arm, "padding_fraction", percent)),
        ("peak GiB", lambda arm: _median(arm, "peak_memory_gib", lambda gib: f"{gib:,.2f}")),
        ("GiB before", lambda arm: _optional(arm.larger_before_gib, lambda gib: f"{gib:,.2f}")),
        ("W", lambda arm: _median(arm, "power_w", lambda watts: f"{watts:,.0f}")),
        ("s to first step", lambda arm: _median(arm, "seconds_to_first_step", lambda s: f"{s:,.1f}")),
        ("of limit", lambda arm: _optional(bench.share_of_limit(arm), percent)),
        ("MFU", lambda arm: _optional(bench.mfu(arm), percent)),
        ("$ / M tokens", lambda arm: _optional(usd_per_million(arm.median("tokens_per_s"), bench.usd_per_hour), usd)),
        ("whole job", lambda arm: _job(arm, bench)),
    ]
    cells = [(heading, [cell(arm) for arm in bench.arms]) for heading, cell in columns]
    said = [(heading, column) for heading, column in cells if any(cell.value != "–" for cell in column)]
    rows = [(arm, [column[i] for _, column in said]) for i, arm in enumerate(bench.arms)]
    return Table([heading for heading, _ in said], rows)


def _png(bench: Bench) -> bytes:
    conditions = f"{job(bench)} · {machine(bench)} · {bench.date}"
    title = f"Training speed of {bench.model.rpartition('/')[2]}"
    if reasons := reasons_against(bench):
        return picture.png(bench, title, conditions, f"not a claim: {'; '.join(reasons)}", good=False)
    over = next(c for c in bench.comparisons if (c.arm, c.over) == (FASTEST, BASELINE))
    verdict = (
        f"Tokens a second without padding, median of the repeats; dots: each repeat. {BASELINE}: plain Hugging Face, "
        f"same rows in the same order; losses agree within {difference(over.largest_loss_difference)}."
    )
    return picture.png(bench, title, conditions, verdict, good=True)


def loss_curves(bench: Bench) -> list[list[float]]:
    """Losses of the first repeat of every arm that ran, fasttune's last: it is drawn strong."""
    ran = sorted((arm for arm in bench.arms if arm.repeats), key=lambda arm: arm.name == FASTEST)
    curves = [arm.repeats[0].losses for arm in ran]
    return curves if len({len(curve) for curve in curves}) == 1 else []


def _median(arm: Arm, attribute: str, text: Callable[[float], str]) -> Cell:
    return _optional(arm.median(attribute), text)


def _optional(value: float | None, text: Callable[[float], str]) -> Cell:
    return Cell("–" if value is None else text(value))


def _spread(arm: Arm, attribute: str, text: Callable[[float], str]) -> Cell:
    values = arm.values(attribute)
    if not values:
        return Cell("failed", bad=True)
    note = f"{text(min(values))}–{text(max(values))}" if len(values) > 1 else "1 repeat"
    return Cell(_median(arm, attribute, text).value, note)


def _ratio(arm: Arm, over: Comparison | None) -> Cell:
    if over is None:
        return Cell("1", "baseline") if arm.name == BASELINE and arm.repeats else Cell("–")
    if over.invalid:
        return Cell("INVALID", bad=True)
    return Cell(f"{over.ratio:.2f}", f"{over.low:.2f}–{over.high:.2f}")


def _job(arm: Arm, bench: Bench) -> Cell:
    speed = arm.median("tokens_per_s")
    if not speed or bench.usd_per_hour is None:
        return Cell("–")
    job_s = bench.job_tokens / speed
    return Cell(duration(job_s), usd(job_s / 3600 * bench.usd_per_hour))
