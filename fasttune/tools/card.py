"""A model card: README.md beside the weights, with what a run has measured and nothing it has not.

Local paths are shown by their last part: a card is made to be shared.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fasttune import hardware, paths, report
from fasttune.config import Config, looks_like_hub
from fasttune.core.run_folder import EVAL_FILES
from fasttune.metrics import RunResult
from fasttune.tools.merge_check import Comparison
from fasttune.tools.trained_model import Finished, open_run

FIELDS = ("seed", "model", "lora", "data", "train", "eval")


@dataclass
class Scored:
    """A line of eval.json, as far as the card shows it."""

    task: str
    metric: str
    value: float | None
    stderr: float | None
    problems: int


def of_run(folder: Path, result: RunResult | None = None) -> None:
    """The card of a run's adapter/ or model/, as far as the run got. Nothing where it saved neither, or a link.

    `result`: what run.json will say, where it is not yet written.
    """
    kind = next((kind for kind in ("adapter", "model") if (folder / kind).is_dir()), None)
    if kind and not (folder / kind).is_symlink():  # that would be somebody else's folder
        finished = open_run(str(folder))
        if result is not None:
            finished = replace(finished, result=json.loads(report.to_json_line(result)))
        write(folder / kind, finished)


def write(folder: Path, finished: Finished, compared: Comparison | None = None) -> None:
    """README.md into a folder of weights; `compared` is what a merge has shown. Raises OutputError."""
    report.write_text(folder / "README.md", text(finished, compared))


def text(finished: Finished, compared: Comparison | None) -> str:
    """The card. Evaluations are those of eval.json in the run's folder."""
    import huggingface_hub
    from markupsafe import Markup

    config = finished.config
    base = config.model.name if config else finished.base.name
    adapter = finished.adapter is not None and compared is None
    sets = [name.partition(":")[0] for name in config.data.sources if looks_like_hub(name)] if config else []
    data = huggingface_hub.ModelCardData(
        base_model=base if looks_like_hub(base) else None,
        datasets=sets or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["fasttune", *(["lora"] if finished.adapter else [])],
    )
    result = result_of(finished)

    def clean(line: str) -> str:
        return _without_paths(line, [*config.data.sources, config.data.eval or "", base] if config else [base])

    return report.fill(
        "card.md.j2",
        metadata=Markup(data.to_yaml()),
        name=config.name if config else shown(finished.name),
        base=shown(base),
        adapter=adapter,
        method="LoRA" if finished.adapter else "full fine-tuning",
        data=[clean(s.value) for s in result.settings if s.name == "data"] if result else [],
        settings=[
            replace(s, value=clean(s.value), reason=clean(s.reason or "") or None)
            for s in result.settings
            if s.name != "data"
        ]
        if result
        else [],
        warnings=[clean(warning) for warning in result.warnings] if result else [],
        config=Markup(_fenced(_recipe(config))) if config else "",
        result=result,
        figures=report.key_figures(result) if result else [],
        hardware=hardware.line(result.hardware) if result else "",
        scores=_scores(finished),
        compared=compared,
    )


def shown(name: str) -> str:
    """A model or data set as a stranger may see it: a hub id or builtin: name, else the last part of its path."""
    return name if name.startswith("builtin:") or looks_like_hub(name) else Path(name).name


def result_of(finished: Finished) -> RunResult | None:
    """run.json as it was written; None where there is none, or one of another version that cannot be shown."""
    if finished.result is None:
        return None
    try:
        result = pydantic.TypeAdapter(RunResult).validate_python(finished.result)
        report.key_figures(result), hardware.line(result.hardware)
    except (ValueError, ArithmeticError, KeyError, TypeError):
        return None
    return result


def _without_paths(line: str, names: list[str]) -> str:
    """The line with models and data sets as they are shown, and any other path by its last part."""
    for name in sorted(filter(None, names), key=len, reverse=True):
        line = line.replace(name, shown(name))
    return re.sub(r"""(?<![^\s([="'`])(?:~|\.{0,2})/(?:\S*/)?(?=[^/\s]+)""", "", line)


def _recipe(config: Config) -> str:
    """The settings that make a run, as YAML."""
    tree: dict[str, Any] = {key: value for key, value in config.model_dump(mode="json").items() if key in FIELDS}
    tree["model"]["name"] = shown(config.model.name)
    train, held_out = config.data.train, config.data.eval
    tree["data"]["train"] = shown(train) if isinstance(train, str) else {shown(k): v for k, v in train.items()}
    tree["data"]["eval"] = shown(held_out) if held_out else None
    if config.train.method == "full":
        del tree["lora"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _fenced(code: str) -> str:
    """A block of YAML that nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}yaml\n{code}{fence}"


def _scores(finished: Finished) -> list[list[str]] | None:
    """The cells of eval.json's table; None where there is no such file, nothing of one that cannot be read."""
    path = finished.run / EVAL_FILES[0] if finished.run else None
    if path is None or not path.exists():
        return None
    try:
        scores = pydantic.TypeAdapter(list[Scored]).validate_python(json.loads(paths.read_text(path))["scores"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [[s.task, s.metric, _number(s.value), _number(s.stderr), str(s.problems)] for s in scores]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
