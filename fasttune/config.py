"""A run, declared once: YAML + `key=value` → a checked Config; every problem is reported at once.

    config = load("configs/quickstart.yaml", ["train.max_steps=20"])

All defaults live here. Units are in the names; `auto` is resolved by plan.py, which prints its reason.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fasttune.errors import ConfigError

# What other trainers call our settings: a person who types one is told ours.
FAMILIAR = {
    "lr": "train.learning_rate",
    "r": "lora.rank",
    "batch_size": "train.batch_rows",
    "per_device_train_batch_size": "train.micro_batch_rows",
    "train_on_responses_only": "data.train_on",
    "num_train_epochs": "train.epochs",
    "max_seq_length": "model.max_length",
    "load_in_4bit": "model.quantization",
    "dataset": "data.train",
}
FORMATS = (
    "messages",
    "conversations",
    "question_answer",
    "query_response",
    "prompt_completion",
    "alpaca",
    "text",
)
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Section(BaseModel):
    """Unknown keys fail; values are checked again after key=value overrides."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """Which weights, at which precision."""

    name: str = Field(min_length=1, description="hub id, local folder, builtin:smollm2-135m or builtin:tiny")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    max_length: int = Field(2048, ge=8, description="tokens of a row, at most")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of the weights and of the arithmetic")
    quantization: Literal["none", "nf4"] = Field("none", description="of the base weights, under an adapter")
    trust_remote_code: bool = Field(False, description="runs code that comes with the model: only if you read it")


class LoraConfig(Section):
    """Adapter on the linear layers. Source: https://arxiv.org/abs/2106.09685."""

    rank: int = Field(16, ge=1, description="of the two matrices of an adapter")
    alpha: float = Field(32, gt=0, description="what they add is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="anything but 0 loses Unsloth's fused kernels")
    targets: list[str] = Field(
        default_factory=lambda: list(SEVEN_PROJECTIONS), min_length=1, description="linear layers that get an adapter"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank): https://arxiv.org/abs/2312.03732")
    init: Literal["default", "pissa"] = Field("default", description="pissa: https://arxiv.org/abs/2404.02948")


class DataConfig(Section):
    """Rows to train on and rows to look at."""

    train: str | dict[str, float] = Field(
        description="JSONL, JSON, CSV (each also .gz, .zst) or Parquet file, hub id owner/name[:subset], "
        "builtin:arithmetic; or several of them as {source: how often a row is seen in an epoch}"
    )
    eval: str | None = Field(None, description="held-out rows: samples, and the loss before and after (eval.every)")
    eval_share: float = Field(0.0, ge=0, lt=1, description="share of the training rows to hold out instead")
    split: str = Field("train", description="split of a hub data set")
    eval_split: str = Field("test", description="split of a hub data set in data.eval")
    streaming: bool = Field(False, description="read a hub data set without downloading all of it first")
    format: Literal["auto", *FORMATS] = Field("auto", description="auto: by the keys of the first row")  # type: ignore[valid-type]
    columns: dict[str, str] = Field(default_factory=dict, description="canonical name → name in the file")
    max_rows: int | None = Field(None, ge=1, description="only the first rows of each source")
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="every answer, only the last one of a conversation, or every token"
    )
    too_long: Literal["truncate", "drop", "split"] = Field(
        "truncate", description="rows of more tokens than model.max_length"
    )

    @property
    def sources(self) -> dict[str, float]:
        """Source → how often each of its rows is seen in an epoch."""
        return {self.train: 1.0} if isinstance(self.train, str) else self.train

    @property
    def held_out_split(self) -> str:
        """The split of `eval`; a file has none."""
        return self.eval_split if self.eval is not None and looks_like_hub(self.eval) else "train"

    @model_validator(mode="after")
    def _sources_and_hold_out(self) -> "DataConfig":
        if not self.sources or not all(self.sources):
            raise ValueError("train: name at least one data set")
        if any(weight <= 0 for weight in self.sources.values()):
            raise ValueError(
                "train: a weight is how often a row is seen in an epoch, above 0; leave the set out instead"
            )
        if self.eval is not None and self.eval_share:
            raise ValueError("eval_share would be ignored beside data.eval: remove one of them")
        if self.eval in self.sources and not self.eval.startswith("builtin:"):
            if not looks_like_hub(self.eval):
                raise ValueError("eval names the rows that are trained on: hold some out with data.eval_share instead")
            if self.split == self.eval_split:
                raise ValueError(f"eval_split={self.eval_split} is what is trained on: name another split of it")
        if self.streaming and not any(looks_like_hub(source) for source in self.sources):
            raise ValueError("streaming would be ignored: it is for hub data sets, files are never read whole")
        return self


class TrainConfig(Section):
    """The optimization. `batch_rows` is the effective batch: rows of one optimizer step."""

    method: Literal["lora", "full"] = Field("lora", description="an adapter, or all weights")
    batch_rows: int = Field(8, ge=1, description="rows of an optimizer step")
    micro_batch_rows: int | Literal["auto"] = Field(
        "auto", description="full rows computed at once; divides batch_rows"
    )
    epochs: float = Field(1.0, gt=0, description="how often all rows are seen")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    learning_rate: float = Field(2e-4, gt=0, description="at its highest, after the warm-up")
    scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="how the learning rate falls")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to it")
    optimizer: Literal["auto", "adamw_torch_fused", "adamw_8bit"] = Field("auto", description="8 bit: of its moments")
    gradient_checkpointing: Literal["auto", "none", "full", "unsloth"] = Field(
        "auto", description="recompute activations to save memory: costs speed"
    )
    packing: bool | Literal["auto"] = Field("auto", description="rows end to end without padding, where that is exact")
    max_bad_steps: int = Field(
        3, ge=0, description="in a row, whose loss or gradient is not finite: left out, then failed"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field("none", description="see docs/tracking.md")

    @model_validator(mode="after")
    def _micro_divides_batch(self) -> "TrainConfig":
        if self.micro_batch_rows != "auto" and (self.micro_batch_rows < 1 or self.batch_rows % self.micro_batch_rows):
            raise ValueError(f"micro_batch_rows {self.micro_batch_rows} must divide batch_rows {self.batch_rows}")
        return self


class CheckpointConfig(Section):
    """When the state of a run goes to disk, so that a machine that vanishes costs only the steps since."""

    every: str = Field("10 minutes", description="'50 steps', '10 minutes' or 'never'")
    keep: int = Field(2, ge=1, description="the newest ones; older ones are removed")
    max_hours: float | None = Field(None, gt=0, description="finish the step, save and stop after so long")

    @field_validator("every", mode="after")
    @classmethod
    def _has_a_unit(cls, every: str) -> str:
        if not re.fullmatch(r"never|[1-9]\d* steps?|\d*\.?\d+ minutes?", every):
            raise ValueError(f"write '50 steps', '10 minutes' or 'never', not '{every}'")
        return every

    @property
    def every_steps(self) -> int | None:
        return int(self.every.split()[0]) if "step" in self.every else None

    @property
    def every_s(self) -> float | None:
        return 60 * float(self.every.split()[0]) if "minute" in self.every else None


class EvalConfig(Section):
    """Loss and token accuracy on held-out rows (data.eval or data.eval_share): nothing is learned from them."""

    every: str = Field("start and end", description="that, or '50 steps' (start and end too), or 'never'")
    rows: int = Field(64, ge=1, description="held-out rows that are looked at, at most")
    problems: int = Field(0, ge=0, description="held-out problems that are answered: right if the number after #### is")
    keep_best: bool = Field(False, description="save the weights of the step with the lowest loss, not the last ones")

    @field_validator("every", mode="after")
    @classmethod
    def _is_known(cls, every: str) -> str:
        if not re.fullmatch(r"start and end|never|[1-9]\d* steps?", every):
            raise ValueError(f"write '50 steps', 'start and end' or 'never', not '{every}'")
        return every

    @property
    def every_steps(self) -> int | None:
        return int(self.every.split()[0]) if self.every.endswith(("step", "steps")) else None


class Config(Section):
    """One fine-tuning run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="of the run, and of its folder")
    seed: int = Field(42, ge=0, lt=2**32, description="of adapter, order of rows, hold-out and dropout")
    output_dir: str | None = Field(None, description="default runs/NAME-YYYYmmdd-HHMMSS")
    overwrite: bool = Field(False, description="replace a run that is already in output_dir")
    samples: int = Field(0, ge=0, le=16, description="held-out problems shown before and after")
    usd_per_hour: float | None = Field(
        None, ge=0, description="price of this machine; default: by GPU, see hardware.py"
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
            raise ValueError("lora.* would be ignored by train.method=full: remove the lora section")
        if self.train.method == "full" and self.model.quantization != "none":
            raise ValueError("model.quantization=nf4 cannot be trained in full: set train.method=lora")
        if self.lora.init == "pissa" and self.model.quantization != "none":
            raise ValueError("lora.init=pissa splits the base weights, which nf4 has not: set lora.init=default")
        held_out = self.data.eval is not None or self.data.eval_share
        asked = {"samples": self.samples, "eval.problems": self.eval.problems, "eval.every": self.eval.every_steps}
        for name in (name for name, value in asked.items() if value and not held_out):
            raise ValueError(f"{name} needs held-out rows: set data.eval or data.eval_share, or leave it out")
        if self.eval.keep_best and self.eval.every_steps is None:
            raise ValueError("eval.keep_best compares steps: set eval.every, e.g. '50 steps'")
        return self


def looks_like_hub(source: str) -> bool:
    """Whether a source that is no file would be taken for a hub id, owner/name."""
    return not source.startswith(("builtin:", ".", "/", "~")) and source.count("/") == 1 and not Path(source).exists()


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything; raises ConfigError with all problems."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "name a YAML file, e.g. configs/quickstart.yaml"
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); {hint}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be decoded"
        raise ConfigError([f"{path}{where}: not valid YAML ({problem}); see configs/quickstart.yaml"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: holds no settings; see configs/quickstart.yaml"])
    problems = _apply_overrides(tree, overrides or [])
    return parse(tree, problems)


def parse(tree: dict[str, Any], problems: list[str] | None = None) -> Config:
    """Check a nested dict against Config; `problems` found earlier are reported together with the new ones."""
    problems = list(problems or [])
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_one_line(item) for item in error.errors()]
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def dump(config: Config, header: str = "", exclude_unset: bool = False) -> str:
    """YAML that `load` reads back to the same Config; `exclude_unset`: without what nobody wrote."""
    unused = {"lora"} if config.train.method == "full" else None
    tree = config.model_dump(mode="json", exclude=unused, exclude_unset=exclude_unset)
    return header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All settings as dotted names, for the nearest-name hint and the documentation."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _apply_overrides(tree: dict[str, Any], overrides: list[str]) -> list[str]:
    problems = []
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            problems.append(f"{override}: not of the form key=value, e.g. train.max_steps=20")
            continue
        try:
            value = yaml.safe_load(text) if text else None  # 3e-4 is text in YAML 1.1: pydantic makes it a number
        except yaml.YAMLError:
            value = text
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            child = node.get(section)
            if not isinstance(child, dict):
                child = node[section] = {}
            node = child
        node[leaf] = value
    return problems


def _one_line(item: Any) -> str:
    location = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "literal["))]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown setting{_nearest(key)}"
    if item["type"] == "missing":
        return f"{key}: is required; add it to the config or give {key}=… on the command line"
    message = item["msg"].removeprefix("Value error, ")
    for kind in ("int", "str", "float"):  # the branch of a union that failed is no part of the key
        key = key.removesuffix(f".{kind}")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _nearest(key: str) -> str:
    candidates, leaf = known_keys(), key.rsplit(".", 1)[-1]
    same_leaf = [name for name in candidates if name.rsplit(".", 1)[-1] == leaf]
    familiar = [FAMILIAR[leaf]] if leaf in FAMILIAR else []
    close = familiar or same_leaf or difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(candidates[:6])}, …)"
