"""A run, declared once: YAML + `key=value` → a checked Config; every problem is reported at once.

    config = load("configs/quickstart.yaml", ["train.max_steps=20"])

All defaults live here. Units are in the names; `auto` is resolved by plan.py, which prints its reason.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fasttune import errors, hints, strict_yaml, system
from fasttune.errors import ConfigError

FORMATS = (
    "messages",
    "conversations",
    "question_answer",
    "query_response",
    "prompt_completion",
    "alpaca",
    "text",
)
LOSSES = ("content", "reasoning", "tool_calls", "tools", "tool_turns")  # what a chat template may leave out of a row
MADE_ROWS = 100_000  # of builtin:arithmetic, when more are asked for than it has
STEPS = r"[1-9][0-9]{0,8} steps?"
TRUST = "model.trust_remote_code"
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _number(value: Any) -> Any:
    """What YAML or Python would read as another number than is meant."""
    if isinstance(value, bool):
        raise ValueError(f"write a number, not {str(value).lower()}")
    if isinstance(value, str) and re.match(r"[-+]?0[\d_]", value.strip()):
        raise ValueError(f"write the number without a 0 in front, not {errors.one_line(value, 100)}")
    return value


Weight = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1000)]
PathText = Annotated[str, AfterValidator(system.path_text)]


class Section(BaseModel):
    """Unknown keys fail; values are checked again after key=value overrides."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        return _number(value) if {int, float} & {kind, *get_args(kind)} else value


class ModelConfig(Section):
    """Which weights, at which precision."""

    name: PathText = Field(description="hub id, local folder, builtin:smollm2-135m or builtin:tiny")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    max_length: int = Field(2048, ge=8, le=2**24, description="tokens of a row, at most")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="of the weights and of the arithmetic; weights that are trained in full: fp32 where they fit",
    )
    quantization: Literal["none", "nf4"] = Field("none", description="of the base weights, under an adapter")
    trust_remote_code: bool = Field(
        False, description="runs code that comes with the model, if you read it; only on the command line"
    )


class LoraConfig(Section):
    """Adapter on the linear layers. Source: https://arxiv.org/abs/2106.09685."""

    rank: int = Field(16, ge=1, le=8192, description="of the two matrices of an adapter")
    alpha: float = Field(32, gt=0, le=100_000, description="what they add is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on a CPU anything but 0 costs the fused LoRA function")
    targets: list[str] = Field(
        default_factory=lambda: list(SEVEN_PROJECTIONS), min_length=1, description="linear layers that get an adapter"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank): https://arxiv.org/abs/2312.03732")
    init: Literal["default", "pissa"] = Field("default", description="pissa: https://arxiv.org/abs/2404.02948")


class DataConfig(Section):
    """Rows to train on and rows to look at."""

    train: PathText | dict[PathText, Weight] = Field(
        description="JSONL, JSON, CSV (each also .gz, .zst) or Parquet file, hub id owner/name[:subset], "
        "builtin:arithmetic; or several of them as {source: how often a row is seen in an epoch}"
    )
    eval: PathText | None = Field(
        None, description="held-out rows: samples, and the loss before and after (eval.every)"
    )
    eval_share: float = Field(0.0, ge=0, lt=1, description="share of the training rows to hold out instead")
    split: str = Field("train", description="split of a hub data set")
    eval_split: str = Field("test", description="split of a hub data set in data.eval")
    streaming: bool = Field(False, description="read a hub data set without downloading all of it first")
    format: Literal["auto", *FORMATS] = Field("auto", description="auto: by the keys of the first row")  # type: ignore[valid-type]
    columns: dict[str, str] = Field(default_factory=dict, description="canonical name → name in the file")
    max_rows: int | None = Field(None, ge=1, le=10**9, description="only the first rows of each source")
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="every answer, only the last one of a conversation, or every token"
    )
    too_long: Literal["truncate", "drop", "split"] = Field(
        "truncate", description="rows of more tokens than model.max_length"
    )
    allow_lost: list[Literal[*LOSSES]] = Field(  # type: ignore[valid-type]
        default_factory=list, description="parts of a row that the chat template may leave out: else an error"
    )
    control_tokens: Literal["keep", "text"] = Field(
        "keep", description="<|im_end|> and the like in what a turn says: control tokens, or the text they are"
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
        if not self.sources:
            raise ValueError("train: name at least one data set")
        if "builtin:arithmetic" in (self.eval, *self.sources) and (self.max_rows or 0) > MADE_ROWS:
            raise ValueError(f"max_rows: builtin:arithmetic makes its rows, at most {MADE_ROWS:,} of them")
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
    batch_rows: int = Field(8, ge=1, le=2**20, description="rows of an optimizer step")
    micro_batch_rows: int | Literal["auto"] = Field(
        "auto", description="full rows computed at once; divides batch_rows"
    )
    epochs: float = Field(1.0, gt=0, le=1000, description="how often all rows are seen")
    max_steps: int | None = Field(None, ge=1, le=10**7, description="optimizer steps; overrides epochs")
    learning_rate: float | None = Field(
        None, ge=1e-12, le=1, description="at its highest, after the warm-up; null: 2e-4 for LoRA, 2e-5 for full"
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="how the learning rate falls")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, le=100, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to it")
    optimizer: Literal["auto", "adamw_torch_fused", "adamw_8bit"] = Field(
        "auto", description="8 bit: of its moments; full fine-tuning in bf16 then holds no fp32 weights either"
    )
    gradient_checkpointing: Literal["auto", "none", "full", "unsloth"] = Field(
        "auto", description="recompute activations to save memory: costs speed"
    )
    packing: bool | Literal["auto"] = Field("auto", description="rows end to end without padding, where that is exact")
    max_bad_steps: int = Field(
        3, ge=0, le=10**7, description="in a row, whose loss or gradient is not finite: left out, then failed"
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
    keep: int = Field(2, ge=1, le=1000, description="the newest ones; older ones are removed")
    max_hours: float | None = Field(None, gt=0, le=100_000, description="finish the step, save and stop after so long")

    @field_validator("every", mode="before")
    @classmethod
    def _has_a_unit(cls, every: Any) -> Any:
        found = re.fullmatch(rf"never|{STEPS}|([0-9]{{0,9}}\.?[0-9]{{1,9}}) minutes?", str(every))
        if not found or (found[1] and float(found[1]) == 0):
            raise ValueError(f"write '50 steps', '10 minutes' or 'never', not {errors.one_line(repr(every), 100)}")
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
    rows: int = Field(64, ge=1, le=100_000, description="held-out rows that are looked at, at most")
    problems: int = Field(
        0, ge=0, le=10_000, description="held-out problems that are answered: right if the number after #### is"
    )
    keep_best: bool = Field(False, description="save the weights of the step with the lowest loss, not the last ones")

    @field_validator("every", mode="before")
    @classmethod
    def _is_known(cls, every: Any) -> Any:
        if not re.fullmatch(rf"start and end|never|{STEPS}", str(every)):
            raise ValueError(f"write '50 steps', 'start and end' or 'never', not {errors.one_line(repr(every), 100)}")
        return every

    @property
    def every_steps(self) -> int | None:
        return int(self.every.split()[0]) if self.every.endswith(("step", "steps")) else None


class Config(Section):
    """One fine-tuning run."""

    name: str = Field("run", max_length=100, pattern=r"^[A-Za-z0-9._-]+$", description="of the run, and of its folder")
    seed: int = Field(42, ge=0, lt=2**32, description="of adapter, order of rows, hold-out and dropout")
    output_dir: PathText | None = Field(None, description="default runs/NAME-YYYYmmdd-HHMMSS")
    overwrite: bool = Field(False, description="replace a run that is already in output_dir")
    samples: int = Field(0, ge=0, le=16, description="held-out problems shown before and after")
    usd_per_hour: float | None = Field(
        None, ge=0, le=1_000_000, description="price of this machine; default: by GPU, see hardware.py"
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
        if self.lora.init == "pissa" and self.model.quantization != "none":
            raise ValueError("lora.init=pissa splits the base weights, which nf4 has not: set lora.init=default")
        held_out = self.data.eval is not None or self.data.eval_share
        asked = {"samples": self.samples, "eval.problems": self.eval.problems, "eval.every": self.eval.every_steps}
        for name in (name for name, value in asked.items() if value and not held_out):
            off = "samples=0" if name == "samples" else "eval=null"
            raise ValueError(f"{name} needs held-out rows: set data.eval or data.eval_share, or give {off}")
        if self.eval.keep_best and self.eval.every_steps is None:
            raise ValueError("eval.keep_best compares steps: set eval.every, e.g. '50 steps'")
        return self


SECTIONS = [name for name, field in Config.model_fields.items() if field.annotation in Section.__subclasses__()]


def looks_like_hub(source: str) -> bool:
    """Whether a source that is no file would be taken for a hub id, owner/name."""
    return not source.startswith(("builtin:", ".", "/", "~")) and source.count("/") == 1 and not os.path.exists(source)


def load(path: str | Path, overrides: list[str] | None = None, ours: bool = False) -> Config:
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
    problems = _apply_overrides(tree, overrides or [])
    if trusts and not any(override.startswith((f"{TRUST}=", "model=")) for override in overrides or []):
        remedy = f"read the model's code, then add {TRUST}=true to the command"
        problems.append(f"{TRUST} is not taken from a file; {remedy}")
    try:
        return parse(tree, problems)
    except ConfigError as error:
        given = tuple(override.partition("=")[0] for override in overrides or [])
        told = [problem if problem.startswith(given) else f"{path}: {problem}" for problem in error.problems]
        raise ConfigError(told) from error


def parse(tree: dict[str, Any], problems: list[str] | None = None) -> Config:
    """Check a nested dict against Config; `problems` found earlier are reported together with the new ones.

    A section that is null is one that is not there.
    """
    problems = list(problems or [])
    config = None
    sections = {name: value for name, value in tree.items() if name not in SECTIONS or value is not None}
    try:
        config = Config.model_validate({"model": {}, "data": {}, **sections})
    except ValidationError as error:
        problems += hints.in_words(error.errors(include_url=False), known_keys())
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
                    raise ValueError(
                        f"{section} is {errors.one_line(repr(node), 100)} already, it takes no settings of its own"
                    )
            node[leaf] = _value(text)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems


def _value(text: str) -> Any:
    """YAML where it begins as a list, a mapping or a quoted text; else the text as it is, or true, false, null."""
    if text.startswith(("{", "[", '"', "'")):
        return strict_yaml.parse(text)
    return {"": None, "~": None, "null": None, "true": True, "false": False}.get(text.lower(), system.writable(text))
