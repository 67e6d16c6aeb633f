"""The settings of a run, section by section; config.py puts them together. All defaults live here.

Units are in the names; core/autoconfig.py says what `auto` means for a machine, and why.
"""

import os
import re
from typing import Annotated, Any, Literal, TypeGuard, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from fasttune import system
from fasttune.errors import one_line

FORMATS = tuple("messages conversations question_answer query_response prompt_completion alpaca text".split())
TOKENS = ".bin"  # Megatron's files of tokens
DATASET_DICT = "dataset_dict.json"  # in a folder of several splits that save_to_disk of the library datasets wrote
TRACKERS = ("tensorboard", "wandb", "trackio")
LOSSES = ("content", "reasoning", "tool_calls", "tools", "tool_turns")  # what a chat template may leave out of a row
MADE_ROWS = 100_000  # of builtin:arithmetic, when more are asked for than it has
SHARE = r"(?:[1-9][0-9]?|100) ?%"  # of all steps
STEPS, MINUTES = r"[1-9][0-9]{0,8} steps?", r"(?=[0-9.]*[1-9])[0-9]{0,9}\.?[0-9]{1,9} minutes?"
RESIDUAL = ("pissa", "olora")  # of lora.init: what the adapter begins with is taken out of the base weights
WSD_DECAY = 0.1  # of the steps: "10 % are enough", https://arxiv.org/abs/2404.06395, section 4
LEARNING_RATES = {
    "lora": (2e-4, "what LoRA is usually trained with: https://arxiv.org/abs/2305.14314, table 9"),
    "full": (2e-5, "what all weights are usually trained with: https://arxiv.org/abs/2307.09288, section 3.1"),
}
EMBEDDING_RATE = 0.1  # of learning_rate; "2 to 10 times smaller": https://unsloth.ai/docs/basics/continued-pretraining
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _plain_number(value: Any) -> Any:
    """What YAML or Python would read as another number than is meant."""
    if isinstance(value, bool):
        raise ValueError(f"write a number, not {str(value).lower()}")
    if isinstance(value, str) and re.match(r"[-+]?0[\d_]", value.strip()):
        raise ValueError(f"write the number without a 0 in front, not {one_line(value, 100)}")
    return value


Beta = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_plain_number)]
Weight = Annotated[float, Field(gt=0, le=1000), BeforeValidator(_plain_number)]
TokenText = Annotated[str, Field(max_length=200, pattern=r"\S")]
PathText = Annotated[str, AfterValidator(system.path_text)]


def _how_often(other: str, pattern: str) -> BeforeValidator:
    """'50 steps', '10 %', 'never' or what `pattern` takes, of which `other` is an example."""

    def checked(every: Any) -> Any:
        if not re.fullmatch(rf"never|{STEPS}|{SHARE}|{pattern}", str(every)):
            raise ValueError(f"write '50 steps', '10 %', '{other}' or 'never', not {one_line(repr(every), 100)}")
        return every

    return BeforeValidator(checked)


def _how_often_as_json(other: str, pattern: str) -> WithJsonSchema:
    """The same for editors."""
    examples = ["50 steps", "10 %", other, "never"]
    return WithJsonSchema({"type": "string", "pattern": rf"^(never|{STEPS}|{SHARE}|{pattern})$", "examples": examples})


def setting(default: Any, meaning: str, **bounds: Any) -> Any:
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
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    max_length: int = setting(2048, "the most tokens of a row", ge=8, le=2**24)
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "of weights and arithmetic; weights that are trained in full: fp32 where they fit"
    )
    quantization: Literal["none", "nf4"] = setting("none", "nf4: the base weights in 4 bits, below an adapter")
    added_tokens: list[TokenText] = Field(
        default_factory=list, description="texts that become a token each, where embeddings are trained"
    )
    trust_remote_code: bool = setting(
        False, "runs code that comes with the model, if you read it; only on the command line"
    )


class LoraConfig(Section):
    """Adapter on the linear layers. Source: https://arxiv.org/abs/2106.09685."""

    rank: int = setting(16, "rank of the two matrices of an adapter", ge=1, le=8192)
    alpha: float = setting(32, "the adapter's output is scaled by alpha / rank", gt=0, le=100_000)
    dropout: float = setting(0.0, "before the adapter; on a CPU, above 0 turns the fused LoRA function off", ge=0, lt=1)
    targets: list[str] = Field(
        default_factory=lambda: list(SEVEN_PROJECTIONS), min_length=1, description="linear layers that get an adapter"
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(rank): https://arxiv.org/abs/2312.03732")
    init: Literal["default", "pissa", "olora", "orthogonal"] = setting("default", "how A and B begin: docs/recipes.md")
    plus_ratio: float | None = setting(None, "learning rate of B ÷ A: https://arxiv.org/abs/2402.12354", ge=1, le=1000)
    refactor_every: int | None = setting(None, "steps after which A and B are balanced again", ge=1, le=10**6)
    train_embeddings: bool = setting(
        False, "embeddings and head are trained too, all of their weights: for a language that the model hardly knows"
    )


class DataConfig(Section):
    """Rows to train on and rows to look at."""

    train: PathText | dict[PathText, Weight] = Field(
        description="JSONL, JSON, CSV, .txt (each also .gz, .zst) or Parquet file, a folder or a pattern (texts/*.txt) "
        "of them, a folder that save_to_disk wrote, Megatron's .bin, hub id owner/name[:subset], builtin:arithmetic; "
        "or several of them as {source: how often a row is seen in an epoch}"
    )
    eval: PathText | None = setting(None, "held-out rows: samples, and the loss before and after (eval.every)")
    eval_share: float = setting(0.0, "share of the training rows to hold out instead", ge=0, lt=1)
    split: str = setting("train", "split of a hub data set, or of a folder that DatasetDict.save_to_disk wrote")
    eval_split: str = setting("test", "the same of data.eval")
    streaming: bool = setting(False, "read a hub data set without downloading all of it first")
    format: Literal["auto", *FORMATS] = setting("auto", "auto: by the keys of the first row")  # type: ignore[valid-type]
    columns: dict[str, str] = Field(default_factory=dict, description="canonical name → name in the file")
    max_rows: int | None = setting(None, "use only the first rows of each source", ge=1, le=10**9)
    deduplicate: bool = setting(
        False, "leave out rows whose prompt and answer came before, in any data set, before rows are held out"
    )
    train_on: Literal["assistant", "last", "all"] = setting(
        "assistant", "every answer, only the last one of a conversation, or every token"
    )
    too_long: Literal["truncate", "drop", "split"] = setting(
        "truncate", "what happens to rows with more tokens than model.max_length"
    )
    allow_lost: list[Literal[*LOSSES]] = Field(  # type: ignore[valid-type]
        default_factory=list,
        description="parts of a row that the chat template may leave out; without this it is an error",
    )
    chat_template: str | None = setting(
        None,
        "in place of the tokenizer's, and saved with the model: a .jinja file, a template as text, or alpaca, chatml, "
        "gemma, llama3, mistral, phi3, qwen or zephyr",
        min_length=1,
    )
    control_tokens: Literal["keep", "text"] = setting(
        "keep", "read <|im_end|> and the like inside of a turn as control tokens, or as plain text"
    )
    documents: Literal["file", "line", "blank_line"] | None = setting(
        None, "of a .txt file: it is one document, each line is one, or they end at a blank line"
    )
    layout: Literal["rows", "concat"] = setting(
        "rows", "concat, of plain text: documents end to end, cut into sequences of model.max_length tokens"
    )
    cross_document: bool = setting(
        False, "of data.layout=concat: whether a token sees the documents before its own in a sequence"
    )
    tokenization: Literal["vanilla", "stochastok", "patok"] = setting(
        "vanilla", "of plain text that is trained on: split tokens at random, see docs/pretraining.md"
    )
    stochastok_p: float | None = setting(
        None, "of stochastok: splits, as a share of the tokens; null: 0.1", gt=0, le=10
    )
    expand_share: float | None = setting(None, "of patok: splits ÷ tokens; null: 0.3", ge=0, le=10)
    contract_share: float | None = setting(None, "of patok: tries to cut at affixes ÷ tokens; null: 0.3", ge=0, le=10)
    affixes: PathText | None = setting(None, "of patok: filipino, or a file of a language's affixes")
    redraw: bool = setting(False, "of stochastok and patok: split anew in every epoch")

    @property
    def sources(self) -> dict[str, float]:
        """Source → how often each of its rows is seen in an epoch."""
        return {self.train: 1.0} if isinstance(self.train, str) else self.train

    @property
    def held_out_split(self) -> str:
        """The split of `eval`; a file has none."""
        return self.eval_split if self.eval is not None and has_splits(self.eval) else "train"

    @model_validator(mode="after")
    def _sources_and_hold_out(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("train: name at least one data set")
        if "builtin:arithmetic" in (self.eval, *self.sources) and (self.max_rows or 0) > MADE_ROWS:
            raise ValueError(f"max_rows: builtin:arithmetic makes its rows, at most {MADE_ROWS:,} of them")
        if self.eval is not None and self.eval_share:
            raise ValueError("eval_share would be ignored beside data.eval: remove one of them")
        if self.eval in self.sources and not self.eval.startswith("builtin:"):
            if not has_splits(self.eval):
                raise ValueError("eval names the rows that are trained on: hold some out with data.eval_share instead")
            if self.split == self.eval_split:
                raise ValueError(f"eval_split={self.eval_split} is what is trained on: name another split of it")
        if self.eval_split != "test" and not (self.eval and has_splits(self.eval)):
            raise ValueError(f"eval_split={self.eval_split} would be ignored: data.eval has no splits; remove it")
        for name in (self.eval or "", *self.sources) if self.layout == "rows" else ():
            if name.endswith(TOKENS):
                raise ValueError(f"{name[-100:]} holds documents of any length: set data.layout=concat")
        return self

    @model_validator(mode="after")
    def _text(self) -> "DataConfig":
        had = {"train_on": self.train_on == "last", "allow_lost": self.allow_lost, "chat_template": self.chat_template}
        for name in filter(had.get, had) if self.format == "text" or self.layout == "concat" else ():
            raise ValueError(f"{name} would be ignored: plain text has no turns; remove it")
        if self.control_tokens == "text" and all(
            name.endswith(TOKENS) for name in (*self.sources, self.eval or TOKENS)
        ):
            raise ValueError("control_tokens would be ignored: files of tokens hold no text; remove it")
        if self.cross_document and self.layout == "rows":
            raise ValueError("cross_document would be ignored: rows see no other; set data.layout=concat")
        if self.layout == "concat" and "too_long" in self.model_fields_set and self.too_long != "truncate":
            raise ValueError(f"too_long={self.too_long} would be ignored: data.layout=concat cuts nothing off")
        of_patok = {"expand_share", "contract_share", "affixes"}
        for name, value in self.model_dump(include={"stochastok_p", "redraw", *of_patok}).items():
            wanted = {"redraw": ("stochastok", "patok")}.get(name, ("patok",) if name in of_patok else ("stochastok",))
            if value not in (None, False) and self.tokenization not in wanted:
                raise ValueError(f"{name} would be ignored by data.tokenization={self.tokenization}")
        if self.tokenization == "patok" and self.affixes is None:
            raise ValueError("tokenization=patok needs affixes: filipino, or a file of a language's own")
        if self.redraw and self.layout == "rows":
            raise ValueError("redraw needs data.layout=concat")
        return self

    @model_validator(mode="after")
    def _streamed(self) -> "DataConfig":
        if self.streaming and not any(looks_like_hub(source) for source in self.sources):
            raise ValueError("streaming would be ignored: it is for hub data sets, files are never read whole")
        return self


class TrainConfig(Section):
    """The optimization. `batch_rows` is the effective batch: rows of one optimizer step."""

    method: Literal["lora", "full"] = setting("lora", "an adapter, or all weights")
    batch_rows: int = setting(8, "rows of an optimizer step", ge=1, le=2**20)
    micro_batch_rows: int | Literal["auto"] = setting("auto", "full rows computed at once; divides batch_rows")
    epochs: float = setting(1.0, "how often all rows are seen", gt=0, le=1000)
    max_steps: int | None = setting(None, "optimizer steps; overrides epochs", ge=1, le=10**7)
    learning_rate: float | None = setting(
        None, "highest value, after the warm-up; null: 2e-4 for LoRA, 2e-5 for full", ge=1e-12, le=1
    )
    embedding_learning_rate: float | None = setting(
        None, "of embeddings and head, with lora.train_embeddings; null: a tenth of learning_rate", ge=1e-12, le=1
    )
    min_learning_rate: float | None = setting(
        None, "value that it falls to, reached behind the last step; null: 0", ge=0, le=1
    )
    scheduler: Literal["linear", "cosine", "constant", "wsd"] = setting(
        "linear", "how the learning rate falls after the warm-up; wsd: at the end only"
    )
    warmup_ratio: float | None = setting(
        0.05, "share of the steps in which the learning rate rises; null beside warmup_steps", ge=0, lt=1
    )
    warmup_steps: int | None = setting(None, "steps in which it rises, in place of warmup_ratio", ge=0, le=10**7)
    decay_ratio: float | None = setting(
        None, f"wsd: share of the steps in which it falls, at the end; null: {WSD_DECAY:g}", gt=0, le=1
    )
    betas: list[Beta] = Field(
        default_factory=lambda: [0.9, 0.999], min_length=2, max_length=2, description="β1 and β2 of AdamW"
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW; not on norms and biases", ge=0, le=100)
    max_grad_norm: float = setting(1.0, "gradients with a larger norm are scaled down to it", gt=0)
    optimizer: Literal["auto", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = setting(
        "auto",
        "adamw_8bit keeps its moments in 8 bits; full fine-tuning then keeps bf16 weights only. paged_adamw_8bit: "
        "8 bits, moved to the host while a GPU's memory is short; full fine-tuning keeps fp32 weights",
    )
    gradient_checkpointing: Literal["auto", "none", "full", "unsloth"] = setting(
        "auto", "recompute activations to save memory: costs speed"
    )
    group_by_prompt: bool = setting(False, "rows with one prompt come in one step; prompts are shuffled, not rows")
    packing: bool | Literal["auto"] = setting("auto", "rows end to end without padding, where that is exact")
    early_stopping_patience: int | None = setting(
        None, "evaluations (eval.every) in a row without a lower held-out loss after which the run ends", ge=1, le=10**6
    )
    max_bad_steps: int = setting(3, "skipped steps in a row (loss or gradient not finite), at most", ge=0, le=10**7)
    report_to: Literal["none", *TRACKERS] | list[Literal[*TRACKERS]] = setting(  # type: ignore[valid-type]
        "none", "one tracker, or several as [tensorboard, wandb]: docs/tracking.md says what each is sent"
    )

    @property
    def trackers(self) -> list[str]:
        """Those of `report_to`."""
        if isinstance(self.report_to, list):
            return self.report_to
        return [] if self.report_to == "none" else [self.report_to]

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError("names a tracker twice: remove one")
        if value == []:
            raise ValueError("names no tracker: name one, or write none")
        return value

    @model_validator(mode="after")
    def _micro_divides_batch(self) -> "TrainConfig":
        if self.micro_batch_rows != "auto" and (self.micro_batch_rows < 1 or self.batch_rows % self.micro_batch_rows):
            raise ValueError(f"micro_batch_rows {self.micro_batch_rows} must divide batch_rows {self.batch_rows}")
        return self

    @model_validator(mode="after")
    def _schedule(self) -> "TrainConfig":
        """What the scheduler needs is filled in; what it would ignore is refused."""
        if self.warmup_steps is None and self.warmup_ratio is None:
            raise ValueError("warmup_ratio: null needs train.warmup_steps; for no warm-up write warmup_ratio=0")
        if self.warmup_steps is not None:
            if "warmup_ratio" in self.model_fields_set and self.warmup_ratio is not None:
                raise ValueError("warmup_ratio would be ignored beside train.warmup_steps: remove one of them")
            self.warmup_ratio = None
        lowest, rate = self.min_learning_rate, self.learning_rate or LEARNING_RATES[self.method][0]
        if lowest is not None and self.scheduler == "constant":
            raise ValueError("min_learning_rate would be ignored by scheduler=constant, which does not fall: remove it")
        if lowest is not None and lowest >= rate:
            other = "lower it; scheduler=constant is a rate that does not fall"
            raise ValueError(f"min_learning_rate {lowest:g} is not below learning_rate {rate:g}: {other}")
        if self.scheduler == "wsd":
            self.decay_ratio = self.decay_ratio or WSD_DECAY
            if self.warmup_ratio is not None and self.warmup_ratio + self.decay_ratio > 1:
                raise ValueError("warmup_ratio and decay_ratio are more than 1 together: lower one of them")
        elif self.decay_ratio is not None:
            raise ValueError(f"decay_ratio would be ignored by scheduler={self.scheduler}: set wsd, or remove it")
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

    every: Annotated[str, _how_often("10 minutes", MINUTES), _how_often_as_json("10 minutes", MINUTES)] = setting(
        "10 minutes", "'50 steps', '10 %' of them, '10 minutes' or 'never'"
    )
    keep: int = setting(2, "how many checkpoints are kept; older ones are removed", ge=1, le=1000)
    max_hours: float | None = setting(None, "finish the step, save and stop after so long", gt=0, le=100_000)

    @property
    def every_s(self) -> float | None:
        return 60 * float(self.every.split()[0]) if "minute" in self.every else None


class EvalConfig(Periodic):
    """Loss and token accuracy on held-out rows (data.eval or data.eval_share), which are not trained on."""

    every: Annotated[
        str, _how_often("start and end", "start and end"), _how_often_as_json("start and end", "start and end")
    ] = setting(
        "start and end", "'start and end', '50 steps' or '10 %' of them (also at the start and at the end), or 'never'"
    )
    rows: int = setting(64, "the most held-out rows to evaluate", ge=1, le=100_000)
    problems: int = setting(
        0, "held-out problems to answer; an answer is right if its number after #### is", ge=0, le=10_000
    )
    keep_best: bool = setting(False, "save the weights of the step with the lowest loss, not the last ones")


def is_section(kind: object) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def looks_like_hub(source: str) -> bool:
    """Whether a source that is no file would be taken for a hub id, owner/name."""
    return not source.startswith(("builtin:", ".", "/", "~")) and source.count("/") == 1 and not os.path.exists(source)


def has_splits(source: str) -> bool:
    return looks_like_hub(source) or os.path.isfile(os.path.join(os.path.expanduser(source), DATASET_DICT))
