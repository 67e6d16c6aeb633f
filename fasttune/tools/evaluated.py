"""The files of an evaluation as they are read for a comparison, and whether several are of the same problems.

Nothing heavy is imported.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from fasttune import system
from fasttune.core import model_files
from fasttune.core.run_folder import EVAL_FILES
from fasttune.errors import DataError, first_line

ASKED = ("tasks", "data", "limit")  # of eval.json: they decide the problems, with the versions of these packages
DEFINE_TASKS = ("lm_eval", "fasttune")
CONDITIONS = ("dtype", "batch_rows", "chat_template", "hardware")  # of eval.json: they can change an answer
NOT_THE_SAME = "eval: they were not asked the same problems"


class Scores(pydantic.BaseModel):
    """What is read of an eval.json."""

    model: str
    weights: str
    tasks: list[str]
    data: str | None
    limit: int | None
    chat_template: bool | None = None  # whether prompts went through it; None: it is not said
    scores: list[dict[str, Any]]
    batch_rows: int
    dtype: str
    requests: int
    from_cache: int
    seconds: float
    date: str
    hardware: str
    versions: dict[str, str]
    warnings: list[str]

    def problems(self) -> dict[str, Any]:
        """What decides the problems, by name."""
        versions = {f"version of {name}": self.versions.get(name) for name in DEFINE_TASKS}
        return {"tasks": ", ".join(sorted(self.tasks)), "data": self.data, "limit": self.limit, **versions}


class Answer(pydantic.BaseModel):
    """What is read of a line of eval_samples.jsonl."""

    task: str
    number: int
    id: str | int | None = None
    filter: str | None = None
    right: bool | None = None
    metrics: dict[str, Any] = {}
    expected: Any = None  # the number at the end of a reference
    target: Any = None

    @property
    def is_right(self) -> bool | None:
        """None where a task does not say so, as with a perplexity."""
        found = self.metrics.get("acc", self.metrics.get("exact_match"))
        if self.right is not None or not isinstance(found, int | float):
            return self.right
        return found > 0


@dataclass(frozen=True)
class Evaluated:
    """One run: its scores, and its answers by task and problem."""

    name: str
    folder: Path
    scores: Scores
    answers: dict[str, dict[str, Answer]]


def read(name: str, folder: Path) -> Evaluated:
    """eval.json and eval_samples.jsonl of a folder. Raises FasttuneError for files that cannot be used."""
    path, lines = (folder / each for each in EVAL_FILES)
    again = "evaluate it again"
    try:
        scores = Scores.model_validate(model_files.read_json(path))
        text = system.read_text(lines)
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path}: {where} is missing or of another kind; {again}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{lines}: cannot be read ({first_line(error)}); {again}") from error
    answers: dict[str, dict[str, Answer]] = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            answer = Answer.model_validate_json(line)
        except pydantic.ValidationError as error:
            raise DataError(f"{lines} line {number}: is no answer to a problem; {again}") from error
        task = answer.task if answer.filter in (None, "none") else f"{answer.task} ({answer.filter})"
        mine = answers.setdefault(task, {})
        mine[_free_key(str(answer.number if answer.id is None else answer.id), mine)] = answer
    return Evaluated(name, folder, scores, answers)


def _free_key(key: str, taken: dict[str, Answer]) -> str:
    """Problems of one id, as a file that holds a row twice has them, are told apart by their order."""
    if key not in taken:
        return key
    return next(again for time in itertools.count(2) if (again := f"{key} ({time})") not in taken)


def check_same(runs: list[Evaluated]) -> None:
    """Raises DataError where two were not asked the same problems. Some that one did not answer are no reason."""
    first = runs[0]
    for each in runs[1:]:
        for (name, value), other in zip(each.scores.problems().items(), first.scores.problems().values(), strict=True):
            if value != other:
                raise DataError(
                    f"{NOT_THE_SAME}: {name} {_said(other)} for {first.name}, {_said(value)} for {each.name}; evaluate "
                    "them again with the same --tasks, --data and --limit"
                )
    for one, other in itertools.combinations(runs, 2):
        for task in one.answers.keys() & other.answers.keys():
            _check_task(task, one, other)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _check_task(task: str, one: Evaluated, other: Evaluated) -> None:
    mine, its = one.answers[task], other.answers[task]
    shared = [key for key in mine if key in its]
    if not shared:
        raise DataError(f"{NOT_THE_SAME}: {one.name} and {other.name} share none of {task}; evaluate them again")
    for key in shared:
        if (mine[key].expected, mine[key].target) != (its[key].expected, its[key].target):
            raise DataError(
                f"{NOT_THE_SAME}: problem {key} of {task} has another right answer for {one.name} than for "
                f"{other.name}; evaluate them again on the same data"
            )


def conditions(runs: list[Evaluated]) -> Iterator[str]:
    """What can change an answer, and was not the same for all."""
    seen = {name: [str(getattr(each.scores, name)) for each in runs] for name in CONDITIONS}
    for name in dict.fromkeys(name for each in runs for name in each.scores.versions):
        seen[f"version of {name}"] = [each.scores.versions.get(name, "none") for each in runs]
    for name, values in seen.items():
        if len(set(values)) > 1:
            shown = ", ".join(f"{each.name}: {value}" for each, value in zip(runs, values, strict=True))
            yield f"not evaluated with the same {name.replace('_', ' ')} ({shown}), which can change an answer"
