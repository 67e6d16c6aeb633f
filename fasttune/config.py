"""A run, declared once: YAML + `key=value` → a checked Config; every problem is reported at once.

config = load("configs/quickstart.yaml", ["train.max_steps=20"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from fasttune import strict_yaml, system
from fasttune.errors import ConfigError, one_line
from fasttune.settings import (
    RESIDUAL,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    PathText,
    Section,
    TrainConfig,
    is_section,
    setting,
)

TRUST = "model.trust_remote_code"


class Config(Section):
    """One fine-tuning run."""

    name: str = setting("run", "name of the run and of its folder", max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = setting(42, "seed of adapter, order of rows, hold-out and dropout", ge=0, lt=2**32)
    output_dir: PathText | None = setting(None, "default runs/NAME-YYYYmmdd-HHMMSS")
    overwrite: bool = setting(False, "replace a run that is already in output_dir")
    samples: int = setting(0, "held-out problems shown before and after", ge=0, le=16)
    usd_per_hour: float | None = setting(
        None, "price of this machine; default: an example for its GPU, see chips.json", ge=0, le=1_000_000
    )
    model: ModelConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.train.method == "full" and "lora" in self.model_fields_set:
            raise ValueError("lora.* would be ignored by train.method=full: remove the lora section, or add lora=null")
        if self.train.method == "full" and self.model.quantization != "none":
            raise ValueError("model.quantization=nf4 cannot be trained in full: set train.method=lora")
        if (init := self.lora.init) in RESIDUAL and self.model.quantization != "none":
            other = "set lora.init=default or model.quantization=none"
            raise ValueError(f"lora.init={init} needs unquantized base weights: {other}")
        if init == "orthogonal" and self.lora.rank % 2:
            raise ValueError(f"lora.init=orthogonal needs an even rank: lora.rank={self.lora.rank + 1}")
        if self.train.group_by_prompt and self.data.layout == "concat":
            raise ValueError("train.group_by_prompt would be ignored: documents of data.layout=concat have no prompt")
        self._check_embeddings()
        held_out = self.data.eval is not None or self.data.eval_share
        on_the_way = self.eval.every_steps or self.eval.share
        asked = {"samples": self.samples, "eval.problems": self.eval.problems, "eval.every": on_the_way}
        answers = "no problem to answer in data.layout=concat: give samples=0 and eval.problems=0"
        if self.data.layout == "concat" and (self.samples or self.eval.problems):
            raise ValueError(answers)
        for name in (name for name, value in asked.items() if value and not held_out):
            off = "samples=0" if name == "samples" else "eval=null"
            raise ValueError(f"{name} needs held-out rows: set data.eval or data.eval_share, or give {off}")
        if self.eval.keep_best and on_the_way is None:
            raise ValueError("eval.keep_best compares steps: set eval.every, e.g. '50 steps'")
        if self.train.early_stopping_patience is not None and on_the_way is None:
            raise ValueError("train.early_stopping_patience counts evaluations: set eval.every, e.g. '50 steps'")
        return self

    def _check_embeddings(self) -> None:
        lora, tokens = self.lora, self.model.added_tokens
        if len(set(tokens)) < len(tokens):
            raise ValueError("model.added_tokens names a token twice: remove one")
        if tokens and self.train.method == "lora" and not lora.train_embeddings:
            fix = "set lora.train_embeddings=true or train.method=full"
            raise ValueError(f"model.added_tokens would have embeddings that are not trained: {fix}, or remove them")
        if not lora.train_embeddings:
            if self.train.embedding_learning_rate is not None:
                what = "all weights have one learning rate" if self.train.method == "full" else "none are trained"
                raise ValueError(f"train.embedding_learning_rate needs lora.train_embeddings=true: {what}; remove it")
            return
        if lora.plus_ratio is not None:
            raise ValueError("lora.plus_ratio has learning rates of its own: remove it, or lora.train_embeddings")
        if lora.init in RESIDUAL:
            raise ValueError(f"lora.init={lora.init} is not for lora.train_embeddings: set lora.init=default")


SECTIONS = [name for name, field in Config.model_fields.items() if is_section(field.annotation)]


def load(path: str | Path, overrides: Sequence[str] = (), ours: bool = False) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything; raises ConfigError with all problems.

    `ours`: this very command has written the file. In any other trust_remote_code is not believed.
    """
    path = Path(path)
    try:
        tree = strict_yaml.read(path)
    except OSError as error:
        hint = "name a YAML file, e.g. configs/quickstart.yaml"
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); {hint}"]) from error
    except strict_yaml.Malformed as error:
        raise ConfigError([f"{path}{error.where}: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: holds no settings; see configs/quickstart.yaml"])
    model = tree.get("model")
    trusts = not ours and isinstance(model, dict) and model.pop("trust_remote_code", None)
    problems = _apply_overrides(tree, overrides)
    if trusts and not any(override.startswith((f"{TRUST}=", "model=")) for override in overrides):
        fix = f"read the model's code, then add {TRUST}=true to the command"
        problems.append(f"{TRUST} is not taken from a file; {fix}")
    try:
        return parse(tree, problems)
    except ConfigError as error:
        given = tuple(override.partition("=")[0] for override in overrides)
        told = [problem if problem.startswith(given) else f"{path}: {problem}" for problem in error.problems]
        raise ConfigError(told) from error


def parse(tree: dict[str, Any], problems: Sequence[str] = ()) -> Config:
    """Check a nested dict against Config; `problems` found earlier are reported together with the new ones.

    A section that is null is one that is not there.
    """
    found = list(problems)
    sections = {name: value for name, value in tree.items() if name not in SECTIONS or value is not None}
    try:
        config = Config.model_validate({"model": {}, "data": {}, **sections})
    except ValidationError as error:
        from fasttune import hints

        found += hints.in_words(error.errors(include_url=False), known_keys())
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return config


def changed(config: Config, **sections: Any) -> Config:
    """The config with other values, checked like any other: changed(config, train={"packing": False}).

    Raises ConfigError.
    """
    tree = config.model_dump(exclude_unset=True)
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if name in SECTIONS else value
    return parse(tree)


def dump(config: Config, header: str = "", exclude_unset: bool = False) -> str:
    """YAML that `load` reads back to the same Config; `exclude_unset`: without what nobody wrote."""
    unused = {"lora"} if config.train.method == "full" else None
    tree = config.model_dump(mode="json", exclude=unused, exclude_unset=exclude_unset)
    return header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def known_keys(model: type[Section] = Config, prefix: str = "") -> list[str]:
    """All settings as dotted names, for the nearest-name hint and the documentation."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put them into the tree; what is wrong with them, a line each."""
    problems = []
    for override in overrides:
        key, sign, text = override.partition("=")
        *sections, leaf = key.split(".")
        if not sign or not leaf or len(sections) > 9:
            problems.append(f"{override}: not of the form key=value, e.g. train.max_steps=20")
            continue
        node: Any = tree
        try:
            for section in sections:
                if node.get(section) is None:
                    node[section] = {}
                node = node[section]
                if not isinstance(node, dict):
                    value = one_line(repr(node), 100)
                    raise ValueError(f"{section} is {value} already, it takes no settings of its own")
            node[leaf] = _value(text)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems


def _value(text: str) -> Any:
    """YAML where it begins as a list, a mapping or a quoted text; else the text as it is, or true, false, null.

    What begins a chat template is a text.
    """
    if text.startswith(("{", "[", '"', "'")) and not text.startswith(("{{", "{%", "{#")):
        return strict_yaml.parse(text)
    return {"": None, "~": None, "null": None, "true": True, "false": False}.get(text.lower(), system.writable(text))
