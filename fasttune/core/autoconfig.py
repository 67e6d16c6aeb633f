"""Config + hardware → settings, each with its reason: what `auto` means on this machine.

The fastest settings whose forecast memory fits; recomputing only when memory asks for it. Pure functions, no torch.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from typing import Any

from fasttune.config import Config, changed
from fasttune.core import schedules
from fasttune.core.memory import PAGED, Choices, Shape, Workload, forecast
from fasttune.data import sharing
from fasttune.data.batching import Batches
from fasttune.errors import ConfigError
from fasttune.hardware import Hardware
from fasttune.metrics import Memory, Setting
from fasttune.settings import EMBEDDING_RATE, LEARNING_RATES

USABLE_MEMORY = 0.8  # the rest: fragmentation, CUDA context, what the forecast does not know
CPU_MICRO_BATCH_TOKENS = 2048
# Of rows that begin alike, on a GPU: below, more calls of attention may cost what they save. Not measured on one yet.
GPU_LEAST_SHARED, GPU_SHARED_GAIN = 64, 0.05  # tokens; share of the tokens that is not computed again
SHARED_STEPS, SHARED_GAIN = 20, 0.03  # steps that are looked at; more rows at once must save such a share of the tokens
INITS = {"pissa": "PiSSA", "olora": "OLoRA", "orthogonal": "orthogonal start"}
EMBEDDING_SOURCE = "https://unsloth.ai/docs/basics/continued-pretraining"
EXPERTS_UNCHECKED = "a mixture of experts: counted from its config.json, a forecast of one has never been checked"


@dataclass(frozen=True)
class Plan(Choices):
    """Every automatic choice made; `settings` is what a person is shown.

    packed: as wished; prepare.py asks the live model whether it can. fits: whether the forecast memory does.
    """

    shape: Shape
    micro_batch_rows: int
    learning_rate: float
    fits: bool
    settings: list[Setting]

    def apply(self, config: Config) -> Config:
        """The config with every `auto` written out: fed back, it makes the same run."""
        train = {
            "micro_batch_rows": self.micro_batch_rows,
            "gradient_checkpointing": self.gradient_checkpointing,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "embedding_learning_rate": embedding_rate(config, self.learning_rate),
            "packing": self.packed,
        }
        return changed(config, model={"dtype": self.dtype}, train=train)


def resolve(config: Config, hardware: Hardware, shape: Shape, parts: int = 1) -> Plan:
    """Choose dtype, checkpointing, micro-batch and optimizer for this machine, where it holds one of `parts` parts of
    the weights.
    """
    dtype, dtype_reason = _dtype(config, hardware)
    gpu_gib = hardware.gpus[0].memory_gib if hardware.gpus else None
    usable_gib = usable_memory_gib(hardware)
    candidates = _candidates(config, replace(Choices.of(config, gpu_gib, parts), dtype=dtype))
    one_row = {choices: full_memory(config, shape, choices, 1).total for choices in candidates}
    chosen = next((choices for choices in candidates if one_row[choices] <= usable_gib), candidates[-1])
    rows, rows_reason = _micro_batch(config, shape, chosen, usable_gib)
    usual_rate, rate_reason = LEARNING_RATES[chosen.method]
    rate = config.train.learning_rate
    fits = full_memory(config, shape, chosen, rows).total <= usable_gib
    size = f"{shape.parameters / 1e6:,.{0 if shape.parameters >= 1e7 else 2}f} M parameters"
    settings = [
        Setting("model", f"{config.model.name}, {size}"),
        *_experts(shape),
        Setting("method", _method(config)),
        Setting("dtype", dtype, dtype_reason),
        Setting("quantization", config.model.quantization),
        Setting("max length", f"{config.model.max_length:,} tokens"),
        Setting("batch", _batch(config, rows), rows_reason),
        Setting("checkpointing", chosen.gradient_checkpointing, _recompute_reason(config, chosen, one_row, usable_gib)),
        Setting("optimizer", _optimizer(config, chosen), _optimizer_reason(config, chosen, one_row, usable_gib)),
        *_trained_weights(chosen),
        *([Setting("weights", f"in {parts} parts, one on each process", "UNSLOTH_FSDP2")] if parts > 1 else []),
        Setting("learning rate", schedules.in_words(config.train, rate or usual_rate), None if rate else rate_reason),
    ]
    if (patience := config.train.early_stopping_patience) is not None:
        many = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
        at_most = "all steps at most; the learning rate is planned for all of them"
        settings.append(Setting("early stopping", f"after {many} without a lower held-out loss", at_most))
    if (slower := embedding_rate(config, rate or usual_rate)) is not None:
        why = (
            None if config.train.embedding_learning_rate else f"{EMBEDDING_RATE:g} of the adapter's: {EMBEDDING_SOURCE}"
        )
        settings.append(Setting("embeddings and head", f"trained in fp32, learning rate {slower:g}", why))
    if chosen.method == "lora" and config.lora.dropout:
        settings.append(Setting("lora dropout", f"{config.lora.dropout:g}"))
    return Plan(
        **vars(chosen),
        shape=shape,
        micro_batch_rows=rows,
        learning_rate=rate or usual_rate,
        fits=fits,
        settings=settings,
    )


def check_paged(config: Config, hardware: Hardware, needs_package: bool) -> None:
    """Raise ConfigError for train.optimizer=paged_adamw_8bit where it cannot run; needs_package: it is to run here."""
    if config.train.optimizer != PAGED:
        return
    lacks = "" if hardware.gpus else "a GPU, out of whose memory it moves its moments"
    if not lacks and needs_package and importlib.util.find_spec("bitsandbytes") is None:
        lacks = "bitsandbytes (pip install bitsandbytes)"
    if lacks:
        raise ConfigError([f"train.optimizer={PAGED} needs {lacks}; or set train.optimizer=auto"])


def share(
    config: Config, hardware: Hardware, plan: Plan, data: Batches, auto: bool, why_not: str | None = None
) -> tuple[Plan, list[Setting]]:
    """Let packs compute once what rows begin with alike, where that is exact; the plan for it, and what it brings.

    auto: nobody has said how many rows are at once; then so many that fit into memory and leave out what fewer would
    compute again. why_not: what keeps the live model from it.
    """
    if config.lora.dropout:
        why_not = "lora.dropout: each row drops out its own"
    if why_not is not None:
        return plan, [Setting("shared beginnings", "computed with every row", why_not)]
    data.least_shared = GPU_LEAST_SHARED if hardware.gpus else sharing.LEAST
    steps, planned = min(data.steps_per_epoch, SHARED_STEPS), plan.micro_batch_rows
    usable_gib, batch = usable_memory_gib(hardware), config.train.batch_rows
    larger = [rows for rows in range(planned + 1, batch + 1) if auto and batch % rows == 0]
    sizes = [planned, *(n for n in larger if full_memory(config, plan.shape, plan, n).total <= usable_gib)]
    tokens, computed = sum(map(data.tokens_of, range(steps))), {n: data.computed_tokens(steps, n) for n in sizes}
    data.micro_rows = rows = next(n for n in sizes if computed[n] * (1 - SHARED_GAIN) <= min(computed.values()))
    if hardware.gpus and computed[rows] > (1 - GPU_SHARED_GAIN) * tokens:
        data.least_shared, data.micro_rows = 0, planned
        return plan, []
    figures = f"{computed[rows] / steps:,.0f} of {tokens / steps:,.0f} tokens a step are computed"
    shown = [Setting("shared beginnings", figures, "what rows of a pack begin with alike is computed once")]
    if rows == planned:
        return plan, shown if computed[rows] < tokens else []
    fewer = f"up to {planned * config.model.max_length:,} at once would compute {computed[planned] / steps:,.0f} a step"
    resized = Setting("batch", _batch(config, rows), f"rows begin alike: {fewer}")
    settings = [resized if each.name == "batch" else each for each in plan.settings]
    return replace(plan, micro_batch_rows=rows, settings=settings), shown


def embedding_rate(config: Config, rate: float) -> float | None:
    """The learning rate of embeddings and head that are trained beside an adapter; None where they are not."""
    if not config.lora.train_embeddings:
        return None
    return config.train.embedding_learning_rate or float(f"{EMBEDDING_RATE * rate:.12g}")


def trainer_settings(config: Config, steps: int) -> dict[str, Any]:
    """What every Hugging Face trainer of a resolved config is told: that of a run, and those of a benchmark."""
    train = config.train
    return {
        "max_steps": steps,
        **schedules.trainer_settings(train, steps),
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": config.model.dtype == "bfloat16",
        "seed": config.seed,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
    }


def full_memory(config: Config, shape: Shape, choices: Choices, rows: int) -> Memory:
    """The most memory that `rows` rows at once can take."""
    largest = Workload.full(min(rows, config.train.batch_rows), config.model.max_length, choices.packed)
    return forecast(config, shape, choices, largest)


def usable_memory_gib(hardware: Hardware) -> float:
    """Of the GPU that trains, or of the machine where there is none."""
    return USABLE_MEMORY * (hardware.gpus[0].memory_gib if hardware.gpus else hardware.memory_gib)


def packing(packed: bool, proof: str) -> Setting:
    """`packed`: whether rows are; `proof`: how that is known to be exact."""
    if packed:
        return Setting("packing", "on", proof)
    return Setting("packing", "off", "rows are padded to the longest of a micro-batch")


def price_of(config: Config, hardware: Hardware, ranks: int = 1) -> tuple[float | None, Setting | None]:
    """Dollars an hour of all that trains, and the setting to show; None where nobody can know."""
    if config.usd_per_hour is not None:
        return config.usd_per_hour, Setting("price", f"${config.usd_per_hour:g} an hour")
    if not hardware.gpus:
        return None, None
    from fasttune import chips

    known = chips.usd_per_hour(hardware.gpus[0].name)
    reason = f"an example of {chips.USD_PER_HOUR_DATE}; set usd_per_hour to yours"
    if known is None:
        return None, None
    return ranks * known, Setting("price", f"${ranks * known:g} an hour", reason)


def _candidates(config: Config, base: Choices) -> list[Choices]:
    """What may be chosen, the fastest first: nothing recomputed, then recomputing, then with 8-bit moments."""
    on_gpu = base.gpu_gib is not None
    optimizers, policies = [base.optimizer], [base.gradient_checkpointing]
    if base.optimizer == "auto":
        eight_bit = base.method == "full" and base.parts == 1 and (on_gpu or base.dtype == "bfloat16")
        optimizers = ["adamw_torch_fused", "adamw_8bit"] if eight_bit else ["adamw_torch_fused"]
    if base.gradient_checkpointing == "auto":
        policies = ["none", "unsloth" if on_gpu else "full"]
    return [
        replace(base, optimizer=optimizer, gradient_checkpointing=policy)
        for optimizer in optimizers
        for policy in policies
    ]


def _micro_batch(config: Config, shape: Shape, choices: Choices, usable_gib: float) -> tuple[int, str | None]:
    """The most rows at once that fit and divide the batch."""
    rows = config.train.batch_rows
    if config.train.micro_batch_rows != "auto":
        return config.train.micro_batch_rows, None
    small = [size for size in range(1, math.isqrt(rows) + 1) if rows % size == 0]
    sizes = sorted({*small, *(rows // size for size in small)}, reverse=True)
    if choices.gpu_gib is None:
        wanted = max(1, CPU_MICRO_BATCH_TOKENS // config.model.max_length)
        sizes = [size for size in sizes if size <= wanted]
    needs = {size: full_memory(config, shape, choices, size).total for size in sizes}
    micro = next((size for size, gib in needs.items() if gib <= usable_gib), None)
    if micro is None:
        return 1, f"even one full row needs about {needs[1]:.0f} GiB, {usable_gib:.0f} GiB can be used"
    if micro == rows:
        return micro, "all rows of a step at once"
    if micro == sizes[0]:
        return micro, f"a CPU gains nothing beyond {CPU_MICRO_BATCH_TOKENS:,} tokens at once"
    more = needs[sizes[sizes.index(micro) - 1]]
    return micro, f"more would need about {more:.0f} of {usable_gib:.0f} GiB"


def _batch(config: Config, micro: int) -> str:
    rows = config.train.batch_rows
    if config.train.packing is False:
        return f"{micro} rows × {rows // micro} = {rows} a step"
    return f"{rows} rows a step, up to {micro * config.model.max_length:,} tokens at once"


def _experts(shape: Shape) -> list[Setting]:
    if shape.experts == 1:
        return []
    return [
        Setting("experts", f"{shape.experts}, {shape.active_experts} of them a token", EXPERTS_UNCHECKED),
        Setting("router", "no auxiliary loss", "as transformers has it by default; it would hang on how rows lie"),
    ]


def _method(config: Config) -> str:
    lora = config.lora
    if config.train.method == "full":
        return "full fine-tuning"
    extras = (", rsLoRA" if lora.rslora else "") + ("" if lora.init == "default" else f", {INITS[lora.init]}")
    return f"LoRA r {lora.rank}, alpha {lora.alpha:g}{extras}, on {len(lora.targets)} projections"


def _dtype(config: Config, hardware: Hardware) -> tuple[str, str | None]:
    if config.model.dtype != "auto":
        return config.model.dtype, None
    if not hardware.gpus:
        return "float32", "no GPU: bf16 is emulated on most CPUs"
    gpu = hardware.gpus[0]
    if gpu.compute_capability >= (8, 0):
        return "bfloat16", f"{gpu.name} has bf16 tensor cores"
    return "float32", f"{gpu.name} (compute capability {'.'.join(map(str, gpu.compute_capability))}) has no bf16"


def _recompute_reason(config: Config, chosen: Choices, one_row: dict[Choices, float], usable_gib: float) -> str | None:
    if config.train.gradient_checkpointing != "auto":
        return None
    fastest_gib = next(iter(one_row.values()))
    needs = f"a full row needs about {fastest_gib:.1f} GiB without it, {usable_gib:.0f} GiB can be used"
    return f"{needs}: recomputing would cost speed" if chosen.gradient_checkpointing == "none" else needs


def _optimizer(config: Config, chosen: Choices) -> str:
    first, second = config.train.betas
    return chosen.optimizer + ("" if (first, second) == (0.9, 0.999) else f", betas {first:g} and {second:g}")


def _optimizer_reason(config: Config, chosen: Choices, one_row: dict[Choices, float], usable_gib: float) -> str | None:
    if config.train.optimizer != "auto":
        return None
    if chosen.optimizer != "adamw_8bit":
        return "one kernel for all parameters"
    exact_gib = min(gib for choices, gib in one_row.items() if choices.optimizer != chosen.optimizer)
    weights = "fp32 weights and moments" if chosen.dtype == "bfloat16" else "exact moments"
    return f"{weights} need about {exact_gib:.0f} GiB with all else, {usable_gib:.0f} GiB can be used"


def _trained_weights(chosen: Choices) -> list[Setting]:
    if chosen.fp32_masters:
        return [Setting("trained weights", "fp32, computed with in bf16", "bf16 weights round small updates away")]
    if chosen.stochastic_rounding:
        why = "rounded to the nearest, small updates would be lost"
        return [Setting("trained weights", "bf16, their updates rounded up or down by chance", why)]
    return []
