"""A model card: README.md beside the weights, with what a run has measured and nothing it has not.

Local paths are shown by their last part: a card is made to be shared.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fasttune import hardware, report
from fasttune.after.finished import Finished, open_run
from fasttune.after.merge_check import Comparison
from fasttune.config import Config, looks_like_hub
from fasttune.metrics import RunResult

FIELDS = ("seed", "model", "lora", "data", "train", "eval")


def of_run(folder: Path, result: RunResult | None = None) -> None:
    """The card of a run's adapter/ or model/, as far as the run got. Nothing where it saved neither.

    `result`: what run.json will say, where it is not yet written.
    """
    kind = next((kind for kind in ("adapter", "model") if (folder / kind).is_dir()), None)
    if kind:
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
        metadata=data.to_yaml(),
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
        config=_recipe(config) if config else "",
        result=result,
        figures=report.key_figures(result) if result else [],
        hardware=hardware.line(result.hardware) if result else "",
        evaluation=_evaluation(finished),
        compared=compared,
    )


def shown(name: str) -> str:
    """A model or data set as a stranger may see it: a hub id or builtin: name, else the last part of its path."""
    return name if name.startswith("builtin:") or looks_like_hub(name) else Path(name).name


def result_of(finished: Finished) -> RunResult | None:
    """run.json as it was written; None where there is none, or one of another version."""
    if finished.result is None:
        return None
    try:
        return pydantic.TypeAdapter(RunResult).validate_python(finished.result)
    except pydantic.ValidationError:
        return None


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


def _evaluation(finished: Finished) -> dict[str, Any] | None:
    path = finished.run / "eval.json" if finished.run else None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path else None
    except (OSError, ValueError):
        return None
