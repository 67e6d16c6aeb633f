"""What the harness found → a figure a task and metric, a line a problem.

A share of problems stands with its 95 % interval, that of a multiple choice with what guessing would reach too.
"""

import math
import numbers
from dataclasses import replace
from typing import Any

from fasttune import metrics, report
from fasttune.data import arithmetic
from fasttune.tools import tasks as own
from fasttune.tools.card import Score
from fasttune.tools.tasks import benchmarks

RIGHT = ("acc", "exact_match", "contained")  # metrics that are 1 for a right answer and 0 for a wrong one

Raw = dict[str, Any]  # what lm_eval's evaluate() returns


def scores(raw: Raw) -> list[Score]:
    """A figure a task and metric, tasks before groups."""
    found = []
    for task, values in {**raw["results"], **raw.get("groups", {})}.items():
        count = raw["n-samples"].get(task, {}).get("effective") or values.get("sample_len", 0)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            score = Score(
                task,
                metric if kind == "none" else f"{metric} ({kind})",
                value,
                error if isinstance(error, float) else None,
                count,
            )
            asked = [sample for sample in _samples(raw, task) if sample["filter"] == kind]
            found.append(_with_interval(score, [sample.get(metric) for sample in asked], asked))
    return found


def _with_interval(score: Score, outcomes: list[Any], samples: list[Raw]) -> Score:
    """The score as it is, unless it is the share of problems that are 1, all others being 0."""
    ones = all(isinstance(outcome, numbers.Real) and outcome in (0, 1) for outcome in outcomes)
    if not outcomes or not ones or score.value is None:
        return score
    if not math.isclose(score.value, sum(outcomes) / len(outcomes), abs_tol=1e-9):
        return score  # a group's mean of means, for one
    low, high = metrics.wilson(sum(outcomes), len(outcomes))
    score = replace(score, low=low, high=high)
    if not all(_is_choice(sample) for sample in samples):
        return score
    chance = sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)
    return replace(score, chance=chance, corrected=(sum(outcomes) / len(outcomes) - chance) / (1 - chance))


def same_options(raw: Raw) -> list[str]:
    """A warning for each task with problems that offer the same option twice."""
    warnings = []
    for task, samples in raw["samples"].items():
        asked = {sample["doc_id"]: sample for sample in samples if _is_choice(sample)}.values()
        counts = [(len(sample["arguments"]), len({tuple(offer) for offer in sample["arguments"]})) for sample in asked]
        if twice := sum(different < offered for offered, different in counts):
            chance, different = (sum(1 / count for count in each) / len(counts) for each in zip(*counts, strict=True))
            warnings.append(
                f"{task}: the same option is offered twice in {twice:,} of {len(counts):,} problems; chance counts all "
                f"options ({report.percent(chance)}), over different ones it is {report.percent(different)}"
            )
    return warnings


def problem(task: str, sample: Raw) -> Raw:
    """One line of eval_samples.jsonl. id: the file's own, else a hash of the problem."""
    found = {name: sample[name] for name in sample["metrics"]}
    told = [found[name] for name in RIGHT if found.get(name) in (0, 1)]
    line = {
        "task": task,
        "number": sample["doc_id"] + 1,
        "id": _id(sample),
        "prompt": sample["arguments"][0][0],
        "right": bool(told[0]) if told else None,
    }
    if (task in own.NAMES or task in benchmarks.NAMES) and not _is_choice(sample):
        generation = sample["resps"][0][0]
        part = benchmarks.compared if task in benchmarks.NAMES else arithmetic.final_number
        parts = {"extracted": part(generation), "expected": part(sample["target"])}
        return line | {"generation": generation, **parts, "reference": sample["target"]}
    line |= {"target": sample["target"], "filter": sample["filter"], "metrics": found}
    if len(sample["arguments"]) > 1:  # the options of a multiple choice, with their log-likelihoods
        line["options"] = [arguments[1] for arguments in sample["arguments"]]
    return line | {"responses": [responses[0] for responses in sample["resps"]]}


def _samples(raw: Raw, task: str) -> list[Raw]:
    """Every problem of a task, or of all tasks of a group."""
    if task in raw["samples"]:
        return list(raw["samples"][task])
    return [sample for part in raw.get("group_subtasks", {}).get(task, []) for sample in _samples(raw, part)]


def _is_choice(sample: Raw) -> bool:
    """A request an option; acc_mutual_info would add one more for each."""
    return len(sample["arguments"]) > 1 and "acc" in sample["metrics"] and "acc_mutual_info" not in sample["metrics"]


def _id(sample: Raw) -> str:
    name = sample["doc"].get("id")
    return str(name) if isinstance(name, str | int) and name != "" else sample["doc_hash"][:16]
