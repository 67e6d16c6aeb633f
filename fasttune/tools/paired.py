"""What several evaluations say together: accuracies, differences and tests on the problems that they share.

Pure data and statistics of what `fasttune eval` wrote; nothing heavy is imported.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from fasttune.errors import DataError
from fasttune.tools import evaluated, proportions
from fasttune.tools.evaluated import ASKED, Evaluated

ALPHA = 0.05  # a difference counts as seen where p after the correction is below
NAMED = 5  # problems that are named, of all


@dataclass(frozen=True)
class Accuracy:
    """Of one run on one task, with Wilson's interval. against_chance: above | below | not different | None."""

    run: str
    right: int
    problems: int
    accuracy: float
    low: float
    high: float
    against_chance: str | None  # None where the level of chance is not known


@dataclass(frozen=True)
class Pair:
    """`run` less `over`, on the problems that both answered. better: one of the two, where a difference was seen."""

    run: str
    over: str
    problems: int
    both_right: int
    only_run_right: int
    only_over_right: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    better: str | None


@dataclass(frozen=True)
class Task:
    task: str
    chance: float | None
    runs: list[Accuracy]
    pairs: list[Pair]


@dataclass(frozen=True)
class Mean:
    """Over the tasks, each of the same weight, of one run's accuracy or (with `over`) of a difference. Not tested."""

    run: str
    over: str | None
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """compare.json. Shares are from 0 to 1, intervals hold 95 %."""

    runs: list[dict[str, Any]]
    asked: dict[str, Any]
    tasks: list[Task]
    mean: list[Mean]  # of two tasks or more
    unpaired: list[dict[str, Any]]  # problems that one of the runs did not answer
    not_compared: list[dict[str, str]]
    alpha: float
    correction: str
    warnings: list[str]
    versions: dict[str, str]
    date: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(runs: list[Evaluated]) -> Comparison:
    """Accuracies, differences and tests. Raises DataError where the runs were not asked the same problems."""
    evaluated.check_same(runs)
    tasks, not_compared = list[Task](), list[dict[str, str]]()
    for name in dict.fromkeys(task for each in runs for task in each.answers):
        if lacking := [each.name for each in runs if name not in each.answers]:
            not_compared.append({"task": name, "why": f"not answered by {', '.join(lacking)}"})
        elif any(answer.is_right is None for each in runs for answer in each.answers[name].values()):
            not_compared.append({"task": name, "why": "its answers are not right or wrong"})
        else:
            tasks.append(_task(name, runs))
    if not tasks:
        why = "; ".join(f"{each['task']}: {each['why']}" for each in not_compared) or "no problem was answered"
        raise DataError(f"eval: nothing can be compared ({why}); choose other --tasks")
    first = runs[0].scores
    left_out = {"scores", "versions", *ASKED}
    pairs = len(tasks[0].pairs)
    return Comparison(
        runs=[{"name": e.name, "output_dir": str(e.folder)} | e.scores.model_dump(exclude=left_out) for e in runs],
        asked={name: getattr(first, name) for name in ASKED},
        tasks=tasks,
        mean=_means(tasks) if len(tasks) > 1 else [],
        unpaired=list(_unpaired(runs, tasks)),
        not_compared=not_compared,
        alpha=ALPHA,
        correction=f"Holm's, over the {pairs} pairs of runs within each task"
        if pairs > 1
        else "none: one pair of runs",
        warnings=list(evaluated.conditions(runs)),
        versions=first.versions,
        date=datetime.now().isoformat(timespec="seconds"),
    )


def _task(name: str, runs: list[Evaluated]) -> Task:
    """One task that all have answered."""
    base = next(iter(runs[0].answers[name].values())).task  # of a filter
    scores = [score for each in runs for score in each.scores.scores if score.get("task") == base]
    chance = next((found for score in scores if isinstance(found := score.get("chance"), int | float)), None)
    right = {e.name: {key: bool(answer.is_right) for key, answer in e.answers[name].items()} for e in runs}
    accuracies = [_accuracy(run, list(answers.values()), chance) for run, answers in right.items()]
    tables = {}
    for over, run in itertools.combinations(right, 2):
        shared = right[run].keys() & right[over].keys()
        cells = Counter((right[run][key], right[over][key]) for key in shared)
        tables[run, over] = (cells[True, True], cells[True, False], cells[False, True], cells[False, False])
    ps = [proportions.mcnemar(only_run, only_over) for _, only_run, only_over, _ in tables.values()]
    whole = zip(tables.items(), ps, proportions.holm(ps), strict=True)
    return Task(name, chance, accuracies, [_pair(run, over, cells, p, holm) for ((run, over), cells), p, holm in whole])


def _accuracy(run: str, right: list[bool], chance: float | None) -> Accuracy:
    share, low, high = proportions.share(sum(right), len(right))
    against = None
    if chance is not None:
        against = "above" if low > chance else "below" if high < chance else "not different"
    return Accuracy(run, sum(right), len(right), share, low, high, against)


def _pair(run: str, over: str, cells: tuple[int, int, int, int], p: float, corrected: float) -> Pair:
    """cells: both right, only `run`, only `over`, neither."""
    value, low, high = proportions.difference(*cells)
    better = None if corrected >= ALPHA else run if value > 0 else over
    return Pair(run, over, sum(cells), *cells[:3], value, low, high, p, corrected, better)


def _means(tasks: list[Task]) -> list[Mean]:
    """Of every run and of every pair, in the order they have in each task."""
    found = []
    for same in zip(*(task.runs for task in tasks), strict=True):
        found.append(Mean(same[0].run, None, *proportions.mean([(e.accuracy, e.low, e.high) for e in same])))
    for alike in zip(*(task.pairs for task in tasks), strict=True):
        estimates = [(each.difference, each.low, each.high) for each in alike]
        found.append(Mean(alike[0].run, alike[0].over, *proportions.mean(estimates)))
    return found


def _unpaired(runs: list[Evaluated], tasks: list[Task]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        known = dict.fromkeys(key for each in runs for key in each.answers[task.task])
        for each in runs:
            if missing := [key for key in known if key not in each.answers[task.task]]:
                count, named = len(missing), missing[:NAMED]
                yield {"task": task.task, "not_answered_by": each.name, "problems": count, "first": named}
