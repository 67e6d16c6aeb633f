"""A run, declared once: YAML + `key=value` → a checked Config; every problem is reported at once.

    config = load("configs/quickstart.yaml", ["train.max_steps=20"])

All defaults live here. Units are in the names; core/autoconfig.py says what `auto` means for a machine, and why.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, get_args

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

from fasttune import strict_yaml, system
from fasttune.errors import ConfigError, one_line

FORMATS = tuple("messages conversations question_answer query_response prompt_completion alpaca text".split())
LOSSES = ("content", "reasoning", "tool_calls", "tools", "tool_turns")  # what a chat template may leave out of a row
MADE_ROWS = 100_000  # of builtin:arithmetic, when more are asked for than it has
SHARE = r"(?:[1-9][0-9]?|100) ?%"  # of all steps
STEPS, MINUTES = r"[1-9][0-9]{0,8} steps?", r"(?=[0-9.]*[1-9])[0-9]{0,9}\.?[0-9]{1,9} minutes?"
TRUST = "model.trust_remote_code"
RESIDUAL = ("pissa", "olora")  # of lora.init: what the adapter begins with is taken out of the base weights
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _plain_number(value: Any) -> Any:
    """What YAML or Python would read as another number than is meant."""
    if isinstance(value, bool):
        raise ValueError(f"write a number, not {str(value).lower()}")
    if isinstance(value, str) and re.match(r"[-+]?0[\d_]", value.strip()):
        raise ValueError(f"write the number without a 0 in front, not {one_line(value, 100)}")
    return value


Weight = Annotated[float, BeforeValidator(_plain_number), Field(gt=0, le=1000)]
PathText = Annotated[str, AfterValidator(system.path_text)]


def _how_often(other: str, pattern: str) -> BeforeValidator:
    """'50 steps', '10 %', 'never' or what `pattern` takes, of which `other` is an example."""

    def checked(every: Any) -> Any:
        if not re.fullmatch(rf"never|{STEPS}|{SHARE}|{pattern}", str(every)):
            raise ValueError(f"write '50 steps', '10 %', '{other}' or 'never', not {one_line(repr(every), 100)}")
        return every

    return BeforeValidator(checked)


def _setting(default: Any, meaning: str, **bounds: Any) -> Any:
    return Field(default, description=meaning, **bounds)


class Section(BaseModel):
    """Unknown keys fail; values are checked again after key=value overrides."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        return _plain_number(value) if {int, float} & {kind, *get_args(kind)} else value


class ModelConfig(Section):
    """Which weights, at which precision."""

    name: PathText = Field(description="hub id, local folder, builtin:smollm2-135m or builtin:tiny")
    revision: str | None = _setting(None, "branch, tag or commit of a hub model")
    max_length: int = _setting(2048, "the most tokens of a row", ge=8, le=2**24)
    dtype: Literal["auto", "bfloat16", "float32"] = _setting(
        "auto", "of weights and arithmetic; weights that are trained in full: fp32 where they fit"
    )
    quantization: Literal["none", "nf4"] = _setting("none", "nf4: the base weights in 4 bits, below an adapter")
    trust_remote_code: bool = _setting(
        False, "runs code that comes with the model, if you read it; only on the command line"
    )


class LoraConfig(Section):
    """Adapter on the linear layers. Source: https://arxiv.org/abs/2106.09685."""

    rank: int = _setting(16, "rank of the two matrices of an adapter", ge=1, le=8192)
    alpha: float = _setting(32, "the adapter's output is scaled by alpha / rank", gt=0, le=100_000)
    dropout: float = _setting(
        0.0, "before the adapter; on a CPU, above 0 turns the fused LoRA function off", ge=0, lt=1
    )
    targets: list[str] = Field(
        default_factory=lambda: list(SEVEN_PROJECTIONS), min_length=1, description="linear layers that get an adapter"
    )
    rslora: bool = _setting(False, "scale by alpha / sqrt(rank): https://arxiv.org/abs/2312.03732")
    init: Literal["default", "pissa", "olora", "orthogonal"] = _setting("default", "how A and B begin: docs/recipes.md")
    plus_ratio: float | None = _setting(None, "learning rate of B ÷ A: https://arxiv.org/abs/2402.12354", ge=1, le=1000)
    refactor_every: int | None = _setting(None, "steps after which A and B are balanced again", ge=1, le=10**6)


class DataConfig(Section):
    """Rows to train on and rows to look at."""

    train: PathText | dict[PathText, Weight] = Field(
        description="JSONL, JSON, CSV (each also .gz, .zst) or Parquet file, hub id owner/name[:subset], "
        "builtin:arithmetic; or several of them as {source: how often a row is seen in an epoch}"
    )
    eval: PathText | None = _setting(None, "held-out rows: samples, and the loss before and after (eval.every)")
    eval_share: float = _setting(0.0, "share of the training rows to hold out instead", ge=0, lt=1)
    split: str = _setting("train", "split of a hub data set")
    eval_split: str = _setting("test", "split of a hub data set in data.eval")
    streaming: bool = _setting(False, "read a hub data set without downloading all of it first")
    format: Literal["auto", *FORMATS] = _setting("auto", "auto: by the keys of the first row")  # type: ignore[valid-type]
    columns: dict[str, str] = Field(default_factory=dict, description="canonical name → name in the file")
    max_rows: int | None = _setting(None, "use only the first rows of each source", ge=1, le=10**9)
    train_on: Literal["assistant", "last", "all"] = _setting(
        "assistant", "every answer, only the last one of a conversation, or every token"
    )
    too_long: Literal["truncate", "drop", "split"] = _setting(
        "truncate", "what happens to rows with more tokens than model.max_length"
    )
    allow_lost: list[Literal[*LOSSES]] = Field(  # type: ignore[valid-type]
        default_factory=list,
        description="parts of a row that the chat template may leave out; without this it is an error",
    )
    control_tokens: Literal["keep", "text"] = _setting(
        "keep", "read <|im_end|> and the like inside of a turn as control tokens, or as plain text"
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

    method: Literal["lora", "full"] = _setting("lora", "an adapter, or all weights")
    batch_rows: int = _setting(8, "rows of an optimizer step", ge=1, le=2**20)
    micro_batch_rows: int | Literal["auto"] = _setting("auto", "full rows computed at once; divides batch_rows")
    epochs: float = _setting(1.0, "how often all rows are seen", gt=0, le=1000)
    max_steps: int | None = _setting(None, "optimizer steps; overrides epochs", ge=1, le=10**7)
    learning_rate: float | None = _setting(
        None, "highest value, after the warm-up; null: 2e-4 for LoRA, 2e-5 for full", ge=1e-12, le=1
    )
    scheduler: Literal["linear", "cosine", "constant"] = _setting("linear", "how the learning rate falls")
    warmup_ratio: float = _setting(0.05, "share of the steps in which the learning rate rises", ge=0, lt=1)
    weight_decay: float = _setting(0.0, "weight decay of AdamW", ge=0, le=100)
    max_grad_norm: float = _setting(1.0, "gradients with a larger norm are scaled down to it", gt=0)
    optimizer: Literal["auto", "adamw_torch_fused", "adamw_8bit"] = _setting(
        "auto", "adamw_8bit keeps its moments in 8 bits; full fine-tuning then keeps bf16 weights only"
    )
    gradient_checkpointing: Literal["auto", "none", "full", "unsloth"] = _setting(
        "auto", "recompute activations to save memory: costs speed"
    )
    group_by_prompt: bool = _setting(False, "rows with one prompt come in one step; prompts are shuffled, not rows")
    packing: bool | Literal["auto"] = _setting("auto", "rows end to end without padding, where that is exact")
    max_bad_steps: int = _setting(3, "skipped steps in a row (loss or gradient not finite), at most", ge=0, le=10**7)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = _setting("none", "see docs/tracking.md")

    @model_validator(mode="after")
    def _micro_divides_batch(self) -> "TrainConfig":
        if self.micro_batch_rows != "auto" and (self.micro_batch_rows < 1 or self.batch_rows % self.micro_batch_rows):
            raise ValueError(f"micro_batch_rows {self.micro_batch_rows} must divide batch_rows {self.batch_rows}")
        return self


class Periodic(Section):
    """Something that is done every so often."""

    every: str

    @property
    def every_steps(self) -> int | None:
        return int(self.every.split()[0]) if "step" in self.every else None

    @property
    def share(self) -> float | None:
        """Of all steps of the run, from one time to the next."""
        return float(self.every.rstrip(" %")) / 100 if "%" in self.every else None


class CheckpointConfig(Periodic):
    """When the state of a run goes to disk, so that a machine that vanishes costs only the steps since."""

    every: Annotated[str, _how_often("10 minutes", MINUTES)] = _setting(
        "10 minutes", "'50 steps', '10 %' of them, '10 minutes' or 'never'"
    )
    keep: int = _setting(2, "how many checkpoints are kept; older ones are removed", ge=1, le=1000)
    max_hours: float | None = _setting(None, "finish the step, save and stop after so long", gt=0, le=100_000)

    @property
    def every_s(self) -> float | None:
        return 60 * float(self.every.split()[0]) if "minute" in self.every else None


class EvalConfig(Periodic):
    """Loss and token accuracy on held-out rows (data.eval or data.eval_share), which are not trained on."""

    every: Annotated[str, _how_often("start and end", "start and end")] = _setting(
        "start and end", "'start and end', '50 steps' or '10 %' of them (also at the start and at the end), or 'never'"
    )
    rows: int = _setting(64, "the most held-out rows to evaluate", ge=1, le=100_000)
    problems: int = _setting(
        0, "held-out problems to answer; an answer is right if its number after #### is", ge=0, le=10_000
    )
    keep_best: bool = _setting(False, "save the weights of the step with the lowest loss, not the last ones")


class Config(Section):
    """One fine-tuning run."""

    name: str = _setting("run", "name of the run and of its folder", max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = _setting(42, "seed of adapter, order of rows, hold-out and dropout", ge=0, lt=2**32)
    output_dir: PathText | None = _setting(None, "default runs/NAME-YYYYmmdd-HHMMSS")
    overwrite: bool = _setting(False, "replace a run that is already in output_dir")
    samples: int = _setting(0, "held-out problems shown before and after", ge=0, le=16)
    usd_per_hour: float | None = _setting(
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
        held_out = self.data.eval is not None or self.data.eval_share
        on_the_way = self.eval.every_steps or self.eval.share
        asked = {"samples": self.samples, "eval.problems": self.eval.problems, "eval.every": on_the_way}
        for name in (name for name, value in asked.items() if value and not held_out):
            off = "samples=0" if name == "samples" else "eval=null"
            raise ValueError(f"{name} needs held-out rows: set data.eval or data.eval_share, or give {off}")
        if self.eval.keep_best and on_the_way is None:
            raise ValueError("eval.keep_best compares steps: set eval.every, e.g. '50 steps'")
        return self


def is_section(kind: object) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


SECTIONS = [name for name, field in Config.model_fields.items() if is_section(field.annotation)]


def looks_like_hub(source: str) -> bool:
    """Whether a source that is no file would be taken for a hub id, owner/name."""
    return not source.startswith(("builtin:", ".", "/", "~")) and source.count("/") == 1 and not os.path.exists(source)


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
    """YAML where it begins as a list, a mapping or a quoted text; else the text as it is, or true, false, null."""
    if text.startswith(("{", "[", '"', "'")):
        return strict_yaml.parse(text)
    return {"": None, "~": None, "null": None, "true": True, "false": False}.get(text.lower(), system.writable(text))
