"""A model card: README.md beside the weights, with what a run has measured and nothing it has not.

Local paths are shown by their last part: a card is made to be shared.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from fasttune import config as configuration, hardware, next_steps, report, system
from fasttune.config import TRUST, Config
from fasttune.core.run_folder import CONFIG, EVAL_FILES
from fasttune.metrics import RunResult, Sample
from fasttune.settings import looks_like_hub

if TYPE_CHECKING:
    from markupsafe import Markup

    from fasttune.tools.merge_check import Comparison
    from fasttune.tools.trained_model import TrainedModel

SAMPLE_CHARACTERS = 600  # of one text of a sample; report.html has all of it
FIELDS = {"seed", "model", "lora", "data", "train", "eval"}  # of a config: what makes the weights


@dataclass(frozen=True)
class Score:
    """One figure of one task: the mean over its problems with its standard error (None where there is no such).

    low, high: 95 % interval of a share of problems (metrics.wilson), None for any other figure. Of a multiple choice
    with k options a problem, chance: the mean of 1/k; corrected: (value - chance) / (1 - chance), 0 for a guesser.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    problems: int
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    corrected: float | None = None


@dataclass(frozen=True)
class Subject:
    """What a card is of: a run, or a model without one. result: what run.json says, or will."""

    name: str
    base: str
    adapter: bool
    config: Config | None = None
    result: dict[str, Any] | None = None
    run: Path | None = None


def of(trained: "TrainedModel") -> Subject:
    adapter = trained.adapter is not None
    return Subject(trained.name, trained.base.name, adapter, trained.config, trained.result, trained.run)


def of_run(folder: Path, result: RunResult | dict[str, Any] | None) -> None:
    """The card of a run's adapter/ or model/, as far as the run got. Nothing where it saved neither, or a link.

    `result`: what run.json says, or will.
    """
    weights = next((folder / kind for kind in ("adapter", "model") if (folder / kind).is_dir()), None)
    if weights and not weights.is_symlink():  # that would be somebody else's folder
        told = json.loads(report.to_json_line(result)) if result else None
        config = configuration.load(folder / CONFIG, [f"{TRUST}=false"])
        write(weights, Subject(str(folder), config.model.name, weights.name == "adapter", config, told, folder))


def write(folder: Path, subject: Subject, compared: "Comparison | None" = None) -> None:
    """README.md into a folder of weights; `compared` is what a merge has shown. Raises OutputError."""
    report.write_text(folder / "README.md", text(subject, compared, folder))


def text(subject: Subject, compared: "Comparison | None" = None, folder: Path | None = None) -> str:
    """The card. Evaluations are those of eval.json in the run's folder; `folder`: of the weights, where it will lie."""
    import huggingface_hub
    from markupsafe import Markup

    config, result = subject.config, result_of(subject)
    base = config.model.name if config else subject.base
    names = [*config.data.sources, config.data.eval or ""] if config else []
    adapter = subject.adapter and compared is None
    data = huggingface_hub.ModelCardData(
        base_model=base if looks_like_hub(base) else None,
        datasets=[name.partition(":")[0] for name in names[:-1] if looks_like_hub(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["fasttune", *(["lora"] if subject.adapter else [])],
    )

    def clean(line: str | None) -> str:
        return _without_paths(line or "", [*names, base])

    settings = [replace(s, value=clean(s.value), reason=clean(s.reason)) for s in result.settings] if result else []
    return report.fill(
        "card.md.j2",
        metadata=Markup(data.to_yaml()),
        name=config.name if config else shown(subject.name),
        base=shown(base),
        adapter=adapter,
        chat=_has_template(folder) and not (result and result.plain_text),
        commands=_commands(subject, base, adapter, folder),
        marks=report.MARKS,
        samples=[_clipped(sample) for sample in result.samples] if result else [],
        samples_note=report.samples_note(result) if result else "",
        method="LoRA" if subject.adapter else "full fine-tuning",
        data=[setting.value for setting in settings if setting.name == "data"],
        settings=[setting for setting in settings if setting.name != "data"],
        warnings=[clean(warning) for warning in result.warnings] if result else [],
        config=Markup(_recipe(config)) if config else "",
        result=result,
        figures=report.key_figures(result) if result else [],
        hardware=hardware.line(result.hardware) if result else "",
        scores=_scores(subject),
        compared=compared,
    )


def _clipped(sample: Sample) -> Sample:
    prompt, reference, after = (each[:SAMPLE_CHARACTERS] for each in (sample.prompt, sample.reference, sample.after))
    return replace(sample, prompt=prompt, reference=reference, after=after)


def _has_template(folder: Path | None) -> bool:
    """Whether the tokenizer in a folder brings a chat template; True of no folder."""
    if folder is None or (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads(system.read_text(folder / "tokenizer_config.json")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _commands(subject: Subject, base: str, adapter: bool, folder: Path | None) -> list[tuple[str, "Markup"]]:
    """What one does next, from within the folder of the card: no path of this machine."""
    from markupsafe import Markup

    text = subject.config is not None and subject.config.data.format == "text"
    found = next_steps.of_run(".", text, adapter, "../merged")
    where = folder or (subject.run / "adapter" if subject.run and adapter else None)
    name = subject.config.name if subject.config else "adapter"
    served = next_steps.serve_model(".")
    if adapter:
        there = base if looks_like_hub(base) else "BASE_MODEL"
        served = (next_steps.serve_adapter(where, name, ".", there) if where else None) or ""
    found += [("serve", served)] if served else []
    return [(purpose, Markup(" ".join(command.replace("```", "").split()))) for purpose, command in found]


def shown(name: str) -> str:
    """A model or data set as a stranger may see it: a hub id or builtin: name, else the last part of its path."""
    return name if name.startswith("builtin:") or looks_like_hub(name) else Path(name).name


def result_of(subject: Subject) -> RunResult | None:
    """run.json as it was written; None where there is none, or one of another version that cannot be shown."""
    try:
        result = pydantic.TypeAdapter(RunResult).validate_python(subject.result)
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
    """The settings that make a run, as a block of YAML that nothing in it can end."""
    tree: dict[str, Any] = config.model_dump(mode="json", include=FIELDS)
    tree["model"]["name"] = shown(config.model.name)
    train, held_out = config.data.train, config.data.eval
    tree["data"]["train"] = shown(train) if isinstance(train, str) else {shown(k): v for k, v in train.items()}
    tree["data"]["eval"] = shown(held_out) if held_out else None
    if config.train.method == "full":
        del tree["lora"]
    code = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}yaml\n{code}{fence}"


def _scores(subject: Subject) -> list[list[str]] | None:
    """The cells of eval.json's table; None where there is no such file, nothing of one that cannot be read."""
    path = subject.run / EVAL_FILES[0] if subject.run else None
    if path is None or not path.exists():
        return None
    try:
        scores = pydantic.TypeAdapter(list[Score]).validate_python(json.loads(system.read_text(path))["scores"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [_cells(score) for score in scores]


def _cells(score: Score) -> list[str]:
    """Of one row of the table; a share of problems has its interval, any other figure its standard error."""
    value, low, high, error, chance, corrected = (
        "–" if number is None else f"{number:.4f}"
        for number in (score.value, score.low, score.high, score.stderr, score.chance, score.corrected)
    )
    spread = f"{low} to {high}" if score.low is not None else f"± {error} (standard error)"
    spread = "–" if score.low is None and score.stderr is None else spread
    return [score.task, score.metric, value, spread, chance, corrected, str(score.problems)]
