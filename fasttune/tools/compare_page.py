"""A comparison for people: on the terminal, and as compare.html (beside compare.json).

A sink: it knows the result types and nothing of how they came about. Runs are lettered in the order they were named.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from fasttune import plots, report, terminal
from fasttune.errors import OutputError, in_one_line
from fasttune.report import percent
from fasttune.terminal import plain
from fasttune.tools.paired import Accuracy, Comparison, Mean, Pair, Task

FILES = ("compare.html", "compare.json")
PLOT_IN = 4.1  # width of a picture: on a phone its letters are 11 pixels high at least


def write(compared: Comparison, folder: Path) -> None:
    """compare.json and compare.html, each atomically. Raises OutputError where they cannot be written."""
    from markupsafe import Markup

    with in_one_line(OutputError, f"--out {folder}: cannot be made", "name another folder", (OSError,)):
        folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / FILES[1], compared.as_dict())
    drawn = {task.task: Markup(picture(compared, task)) for task in compared.tasks}
    several = [each for each in compared.mean if each.over is None]
    machines = {each["hardware"]: None for each in compared.runs}
    page = report.fill(
        "compare.html.j2",
        compared=compared,
        letters=letters(compared),
        findings=findings(compared),
        drawn=drawn,
        spoken={task.task: spoken(compared, task) for task in compared.tasks},
        mean={"runs": several, "pairs": [each for each in compared.mean if each.over is not None]},
        hardware=[("machine" if len(machines) == 1 else f"machine {i}", name) for i, name in enumerate(machines, 1)],
        versions=compared.versions.items(),
        percent=percent,
        interval=interval,
        points=points,
        p_text=p_text,
        seen=seen,
        by_chance=by_chance,
        missing=missing,
        duration=report.duration,
    )
    report.write_text(folder / FILES[0], page)


def letters(compared: Comparison) -> dict[str, str]:
    """Name → A, B, C …"""
    return {each["name"]: chr(ord("A") + at) for at, each in enumerate(compared.runs)}


def interval(each: Accuracy | Mean) -> str:
    """40.1–50.3, in percent."""
    return f"{100 * each.low:.1f}–{100 * each.high:.1f}"


def points(share: float) -> str:
    """A difference of two shares in percentage points, with its sign: +3.1, −2.0, 0.0."""
    text = f"{100 * abs(share):.1f}"
    return text if text == "0.0" else f"{'+' if share > 0 else '−'}{text}"


def between(each: Pair | Mean) -> str:
    return f"{points(each.low)} to {points(each.high)}"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def seen(pair: Pair, names: dict[str, str]) -> str:
    """What the test says of a pair. Never that two are equal."""
    return f"{names[pair.better]} better" if pair.better else "no difference seen"


def by_chance(task: Task, names: dict[str, str]) -> str:
    """What the intervals say of the level of chance, but for runs above it: "not different: A, B; below: C"."""
    said = []
    for kind in ("not different", "below"):
        if which := [names[each.run] for each in task.runs if each.against_chance == kind]:
            said.append(f"{kind}: {', '.join(which)}")
    return "; ".join(said)


def findings(compared: Comparison) -> list[str]:
    """What is worth saying of all the tables, a sentence each: differences seen, tasks without one, and chance."""
    names, found, none = letters(compared), list[str](), list[str]()
    for task in compared.tasks:
        better = [pair for pair in task.pairs if pair.better]
        found += [_better(pair, names, task.task) for pair in better]
        none += [] if better else [task.task]
    if none:
        found.append(f"No difference seen between any two runs: {_listed(none, len(compared.tasks))}")
    for name, letter in names.items():
        known = [(task.task, each) for task in compared.tasks for each in task.runs if each.run == name]
        near = [task for task, each in known if each.against_chance == "not different"]
        below = [task for task, each in known if each.against_chance == "below"]
        judged = sum(each.against_chance is not None for _, each in known)
        if near:
            found.append(f"{letter} is not different from chance: {_listed(near, judged)}")
        if below:
            found.append(f"{letter} is below chance: {_listed(below, judged)}")
    return found


def _better(pair: Pair, names: dict[str, str], task: str) -> str:
    """As better less worse, whichever of the two was named first."""
    one, other, value, ends = pair.run, pair.over, pair.difference, (pair.low, pair.high)
    if pair.better == pair.over:
        one, other, value, ends = pair.over, pair.run, -pair.difference, (-pair.high, -pair.low)
    difference = f"{points(value)} points ({points(ends[0])} to {points(ends[1])})"
    p = f"{'corrected p' if len(names) > 2 else 'p'} {p_text(pair.p_holm)}"
    return f"{names[one]} is better than {names[other]} on {task}: {difference}, {p}"


def _listed(tasks: list[str], of: int) -> str:
    if len(tasks) == of > 1:
        return f"on all {of} tasks"
    return f"on {', '.join(tasks)}" + (f" ({len(tasks)} of {of} tasks)" if of > 1 else "")


def picture(compared: Comparison, task: Task) -> str:
    """The accuracies of a task with their intervals; a hollow dot is one not different from chance."""
    names = letters(compared)
    rows = [(names[e.run], e.accuracy, e.low, e.high, e.against_chance != "not different") for e in task.runs]
    return plots.interval_plot(rows, task.chance, PLOT_IN)


def spoken(compared: Comparison, task: Task) -> str:
    """The picture in words."""
    names = letters(compared)
    said = [f"{names[each.run]} {percent(each.accuracy)} ({interval(each)})" for each in task.runs]
    chance = [] if task.chance is None else [f"chance {percent(task.chance)}"]
    return f"Accuracy with 95 % interval on {task.task}: {', '.join([*said, *chance])}"


def show(compared: Comparison, folder: Path, console: Console = terminal.console) -> None:
    """On stderr: what the letters stand for, accuracies, differences with their test, findings, where the files are."""
    console.print(Rule(Text(f"{len(compared.runs)} runs compared", style="bold"), align="left", style="dim"))
    legend = [(letter, name, None) for name, letter in letters(compared).items()]
    note = (
        "small: 95 % intervals, not corrected; differences in percentage points; p: McNemar's exact test; correction: "
    )
    note += compared.correction
    width = console.width - 4
    parts: list[RenderableType] = [
        terminal.grid(legend),
        _accuracies(compared, width),
        _differences(compared, width),
    ]
    parts.append(Text(note, style="dim"))
    parts += [Text(f"· {plain(each)}") for each in findings(compared)]
    for part in parts:
        console.print(Padding(part, (0 if isinstance(part, Text) else 1, 2, 0, 2)))
    lines = [f"{each['task']}: not compared, {each['why']}" for each in compared.not_compared]
    lines += [missing(each) for each in compared.unpaired]
    for text in [*lines, *compared.warnings]:
        console.print(Padding(Text.assemble(("warning ", "bold yellow"), plain(text)), (0, 2)))
    console.print()
    for name in FILES:  # a path must stay in one piece to be copied
        console.print(Text(plain(str(folder / name))), soft_wrap=True)


def missing(each: dict[str, object]) -> str:
    """An entry of Comparison.unpaired as a sentence."""
    first = each["first"]
    assert isinstance(first, list)
    return (
        f"{each['task']}: {each['not_answered_by']} did not answer {each['problems']:,} problems, left out of its "
        f"pairs: {', '.join(first)}{' …' if each['problems'] != len(first) else ''}"
    )


def _accuracies(compared: Comparison, width: int) -> Group:
    rows: dict[str, list[list[Text]]] = {}
    for task in compared.tasks:
        cells = [_cell(100 * each.accuracy, interval(each)) for each in task.runs]
        count = max(each.problems for each in task.runs)
        chance = "–" if task.chance is None else f"{100 * task.chance:.1f}"
        rows[task.task] = [[Text(f"{count:,}"), Text(chance), *cells]]
    if compared.mean:
        cells = [_cell(100 * each.value, interval(each)) for each in compared.mean if each.over is None]
        rows["mean over tasks"] = [[Text(), Text(), *cells]]
    headings = ["problems", "chance", *(f"{letter}, %" for letter in letters(compared).values())]
    return terminal.under_names(rows, "r" * len(headings), width, headings)


def _cell(value: float, note: str) -> Text:
    return Text.assemble(f"{value:.1f}", (f"\n{note}", "dim"))


def _differences(compared: Comparison, width: int) -> Group:
    names = letters(compared)
    pairs: dict[str, Sequence[Pair | Mean]] = {task.task: task.pairs for task in compared.tasks}
    if mean := [each for each in compared.mean if each.over is not None]:
        pairs["mean over tasks"] = mean

    def row(each: Pair | Mean) -> list[Text]:
        p, said = ("–", "not tested") if isinstance(each, Mean) else (p_text(each.p_holm), seen(each, names))
        value = each.value if isinstance(each, Mean) else each.difference
        pair = f"{names[each.run]} − {names[each.over or '']}"
        style = "bold green" if isinstance(each, Pair) and each.better else "dim"
        return [Text(pair), Text(points(value)), Text(between(each), style="dim"), Text(p), Text(said, style=style)]

    rows = {task: [row(each) for each in of_task] for task, of_task in pairs.items()}
    return terminal.under_names(rows, "lrrrl", width, ["", "points", "", "p", ""])
