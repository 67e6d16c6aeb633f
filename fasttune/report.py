"""A finished run as files (run.json, report.html), and the key figures that the files and the terminal both show.

A sink: it knows the result types of metrics.py and nothing of how a run is made.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from fasttune import metrics, next_steps, plots, system
from fasttune.errors import OutputError
from fasttune.metrics import RunResult, StepMetrics

MARKS = {True: "✓", False: "✗", None: ""}  # of an answer; told apart without colour


@dataclass(frozen=True)
class Figure:
    """One key figure, ready to print. `value` is "not known" where it cannot be said honestly; `note` says why."""

    label: str
    value: str
    note: str = ""


def usd(amount: float) -> str:
    """Dollars that stay readable when they are small: $1,234.50, $0.25, $0.0003."""
    if 0 < amount < 0.0001:
        return "under $0.0001"
    return f"${amount:,.4f}" if 0 < amount < 0.1 else f"${amount:,.2f}"


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 2 min 41 s or 1 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def rate(per_s: float) -> str:
    """A rate per second without its unit: 12,473 or 31.5."""
    return f"{per_s:,.0f}" if abs(per_s) >= 100 else f"{per_s:,.1f}"


def steps_text(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}step{'' if count == 1 else 's'}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def interval(low: float, high: float) -> str:
    """A 95 % interval of a share, in percent: `25 to 57`; a narrow one with a decimal."""
    digits = 0 if high - low >= 0.1 else 1
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"


def key_figures(result: RunResult) -> list[Figure]:
    """What a person asks first stands before "first step"; what follows says how the numbers were made."""
    counted = f"padding not counted; median of {steps_text(result.steady_steps, 'steady ')}"
    again = result.tokens - result.computed_tokens
    supervised = f"{result.loss_tokens:,} of them supervised (the others are context)"
    shared, computed = f"; {again:,} shared with other rows, not computed again" if again else "", ""
    if again and result.computed_tokens_per_s is not None:
        computed = f"; {rate(result.computed_tokens_per_s)} of them computed, as rows begin alike"
    computed += f"; {result.rows_per_s:,.3g} rows/s" if result.rows_per_s else ""
    computed += f"; the GPU ran kernels {percent(result.gpu_busy)} of the time" if result.gpu_busy is not None else ""
    too_short = "not enough steps to say"
    cost = "no price: set usd_per_hour" if result.usd_per_hour is None else f"at {usd(result.usd_per_hour)} per hour"
    if result.usd_per_million_tokens is not None:
        cost += f"; {usd(result.usd_per_million_tokens)} per million tokens at the steady speed"
    measured = result.measured_matmul_tflops
    matmul = "of the matmul rate measured on this machine" + ("" if measured is None else f", {measured:,.2f} TFLOP/s")
    comparable = "unquantised weights, no mixture of experts and steady steps"
    return [
        _loss(result),
        *_held_out(result),
        *_sources(result),
        *_exact_match(result),
        _known("speed", result.tokens_per_s, _tokens_per_s, counted + computed, too_short),
        *_ranks(result),
        Figure("peak memory", f"{result.peak_memory_gib:,.1f} GiB", _outside_steps(result)),
        Figure("time", duration(result.wall_s), f"{steps_text(result.steps)}; from start to end, loading included"),
        _known("cost", result.cost_usd, usd, cost, cost),
        _known("first step", result.seconds_to_first_step, duration, "from the start to its end", "no step finished"),
        Figure("tokens", f"{result.tokens:,}", supervised + shared),
        _known("supervised tokens", result.loss_tokens_per_s, _tokens_per_s, counted, too_short),
        Figure("padding", percent(result.padding_fraction), "of all computed tokens; no speed counts it"),
        _known(
            "MFU",
            result.mfu,
            percent,
            "of the dense datasheet peak",
            f"needs a chip with a known datasheet peak, {comparable}",
        ),
        _known("matmul share", result.fraction_of_measured_matmul, percent, matmul, f"needs {comparable}"),
        *_forecast(result),
    ]


def _ranks(result: RunResult) -> list[Figure]:
    """Of a run of several processes."""
    ranks = result.ranks
    if ranks is None:
        return []
    where = f"{ranks.ranks}" + (f" on {ranks.nodes} machines" if ranks.nodes > 1 else "")
    notes = []
    if result.tokens_per_s is not None:
        notes.append(f"{rate(result.tokens_per_s / ranks.ranks)} tokens/s each")
    if ranks.straggler is not None:
        notes.append(f"the slowest computes {ranks.straggler:.2f} times as long as the mean")
    if peaks := ranks.peak_memory_gib:  # told at the end of each step: of a run that lost a rank before, none are known
        notes.append(f"peak memory {min(peaks):,.1f} to {max(peaks):,.1f} GiB")
    return [Figure("processes", where, "; ".join(notes))]


def _known(label: str, value: float | None, text: Callable[[float], str], note: str, why_not: str) -> Figure:
    return Figure(label, "not known", why_not) if value is None else Figure(label, text(value), note)


def _tokens_per_s(per_s: float) -> str:
    return f"{rate(per_s)} tokens/s"


def _loss(result: RunResult) -> Figure:
    if result.first_loss is None or result.last_loss is None:
        return Figure("loss", "not known", "no step finished")
    note = "first and last step"
    if result.first_loss > 0 and math.isfinite(result.last_loss):
        note = f"{result.last_loss / result.first_loss:.2f} × the first step's"
    return Figure("loss", f"{result.first_loss:.3f} → {result.last_loss:.3f}", note)


def _held_out(result: RunResult) -> list[Figure]:
    """Nothing where no rows are held out."""
    seen = result.held_out
    if seen is None or seen.after is None:
        return []
    losses, right = f"{seen.after.loss:.3f}", percent(seen.after.token_accuracy)
    if seen.before:
        losses, right = f"{seen.before.loss:.3f} → {losses}", f"{percent(seen.before.token_accuracy)} → {right}"
    note = f"{seen.rows:,} held-out rows; first guess right: {right} of tokens"
    if seen.best and seen.best.step != seen.after.step:
        note += f"; lowest {seen.best.loss:.3f} at step {seen.best.step:,}"
    if seen.saved_step not in (None, seen.after.step):
        note += f"; saved are the weights of step {seen.saved_step:,}"
    found = [Figure("held-out loss", losses, note)]
    if result.plain_text:
        values = [math.exp(min(each.loss, 700.0)) for each in (seen.before, seen.after) if each]
        what = "e to the power of the held-out loss: as unsure as a choice among so many tokens"
        found.append(Figure("perplexity", " → ".join(f"{value:,.4g}" for value in values), what))
    return found


def _sources(result: RunResult) -> list[Figure]:
    """A line each, where there are several."""
    found = []
    for each in result.sources:
        notes = [] if each.tokens_per_s is None else [f"{rate(each.tokens_per_s)} tokens/s"]
        if each.last_loss is not None:
            losses = [loss for loss in (each.first_loss, each.last_loss) if loss is not None]
            notes.append("held-out loss " + " → ".join(f"{loss:.3f}" for loss in losses))
            notes[-1] += f", perplexity {math.exp(min(losses[-1], 700.0)):,.4g}" if result.plain_text else ""
        found.append(Figure(f"tokens of {Path(each.source).name}", f"{each.tokens:,}", "; ".join(notes)))
    return found


def _exact_match(result: RunResult) -> list[Figure]:
    """Nothing where no problems were to be answered, or the run did not complete."""
    match = result.exact_match
    if match is None:
        return []
    shares = (match.before, match.after)
    note = f"on {match.problems:,} held-out problems, before and after training"
    ends = [interval(*metrics.wilson(share * match.problems, match.problems)) for share in shares]
    return [Figure("exact match", " → ".join(map(percent, shares)), f"{note} (95 %: {ends[0]} → {ends[1]})")]


def samples_note(result: RunResult) -> str:
    """What the samples stand for, so that none misleads: how many of all problems are right."""
    match = result.exact_match
    if match is None or not result.samples:
        return ""
    right = round(match.after * match.problems)
    said = f"{MARKS[True]} right and {MARKS[False]} wrong as the exact match counts: "
    if right in (0, match.problems):
        all_of_them = f"all {match.problems:,} answers are" if right else f"none of the {match.problems:,} answers is"
        return f"{said}{all_of_them} right after training"
    return f"{said}{right:,} of {match.problems:,} answers are right after training ({percent(match.after)})"


def _outside_steps(result: RunResult) -> str:
    """Where loading or evaluating took more than the steps: it decides what fits."""
    outside = result.peak_outside_steps_gib or 0.0
    return f"in the steps; {outside:,.1f} GiB outside of them" if outside > result.peak_memory_gib else ""


def _forecast(result: RunResult) -> list[Figure]:
    """What was expected, and how far what was measured lies from it; nothing without a forecast."""
    if result.forecast is None:
        return []
    peak, speed = result.forecast.peak_memory_gib, result.forecast.tokens_per_s

    def against(measured: float | None, expected: float) -> str:
        if measured is None:
            return "not measured"
        return f"{abs(measured / expected - 1):.0%} {'less' if measured < expected else 'more'} was measured"

    value = f"{peak.expected:,.1f} GiB"
    note = f"{against(result.peak_memory_gib, peak.expected)} (range {peak.low:,.1f} to {peak.high:,.1f})"
    if speed is not None:
        value += f", {_tokens_per_s(speed.expected)}"
        found = against(result.tokens_per_s, speed.expected)
        note = f"memory: {note}; speed: {found} (range {rate(speed.low)} to {rate(speed.high)})"
    return [Figure("forecast", value, note)]


UNSLOTHS = ("patched_layers", "patched_mlps", "fused_lora_layers")


def what_ran(result: RunResult) -> list[tuple[str, str]]:
    """The backend that actually ran, as label and value; Unsloth's kernels only where there is a GPU for them."""
    fields = vars(result.backend).items()
    shown = [(name, value) for name, value in fields if value or name not in UNSLOTHS or result.hardware.get("gpus")]
    return [(name.replace("_", " "), str(value)) for name, value in shown]


def write_json(path: Path | str, data: Any) -> None:
    """Write a mapping or dataclass as JSON, atomically; NaN and infinities, which JSON does not have, become null.

    Raises OutputError where the file cannot be written, TypeError for a value that JSON cannot hold.
    """
    write_text(Path(path), json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_json_line(data: Any) -> str:
    """A mapping or dataclass as one line of JSON, ASCII only so that any terminal or pipe can take it; NaN is null."""
    return json.dumps(_finite(data), allow_nan=False)


def write_html(path: Path | str, result: RunResult, steps: list[StepMetrics]) -> None:
    """Write a report that opens offline: one file, no script, nothing loaded from anywhere. Atomic.

    Raises OutputError where the file cannot be written.
    """
    page = fill(
        "report.html.j2",
        result=result,
        figures=key_figures(result),
        marks=MARKS,
        samples_note=samples_note(result),
        next_steps=next_steps.after_training(result),
        what_ran=what_ran(result),
        hardware=facts(result.hardware),
        versions=result.versions.items(),
        plots=plots.of_run(steps, result.held_out, result.exact_match),
        drawn_every=plots.stride(steps),
    )
    write_text(Path(path), page)


def fill(template: str, **values: Any) -> str:
    """A template with its values, which are text and nothing else in HTML and in Markdown; Markup stays as it is."""
    import jinja2  # with matplotlib about a second of imports that only pages need

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        finalize=markdown if template.endswith(".md.j2") else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def markdown(value: Any) -> str:
    """Text that Markdown shows as it is, on one line: no tag, link, picture, code, emphasis or column of a table."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(str(value).splitlines()))
    return text.replace("<", "&lt;").replace(">", "&gt;")


UNITS = {"_gib": " GiB", "_w": " W"}


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A dict as rows of a table: what a name says of its unit stands behind the value."""
    found = []
    for name, value in values.items():
        ending = next((each for each in UNITS if name.endswith(each)), "")
        unit = UNITS[ending] if ending and value is not None else ""
        found.append((name.removesuffix(ending).replace("_", " "), readable(value) + unit))
    return found


def readable(value: Any) -> str:
    """A value of a nested dict (hardware facts) on one line: floats short, nothing as a dash."""
    if value in (None, [], (), {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in facts(value))
    if isinstance(value, (list, tuple)):
        return "; ".join(readable(item) for item in value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value):
        return {each.name: _finite(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_text(path: Path, text: str) -> None:
    """As UTF-8, atomically; a lone surrogate (odd file names) becomes its \\u escape. Raises OutputError."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """The whole content or the old file: never half a file. Raises OutputError."""
    try:
        system.write_atomic(path, content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror} (choose another output_dir)") from error
