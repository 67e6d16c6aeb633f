"""Config + hardware → settings, each with its reason: what `auto` means on this machine.

The fastest settings whose forecast memory fits; recomputing only when memory asks for it. Pure functions, no torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fasttune import hardware as machines
from fasttune.config import Config
from fasttune.core.memory import Choices, MicroBatch, forecast
from fasttune.core.shape import Shape
from fasttune.hardware import Hardware
from fasttune.metrics import Memory, Setting

USABLE_MEMORY = 0.8  # the rest: fragmentation, CUDA context, what the forecast does not know
CPU_MICRO_BATCH_TOKENS = 2048
EXPERTS_UNCHECKED = "a mixture of experts: counted from its config.json, a forecast of one has never been checked"


@dataclass(frozen=True)
class Plan(Choices):
    """Every automatic choice made; `settings` is what a person is shown.

    packed: as wished; prepare.py asks the live model whether it can. fits: whether the forecast memory does.
    """

    shape: Shape
    micro_batch_rows: int
    fits: bool
    settings: list[Setting]

    def apply(self, config: Config) -> Config:
        """The config with every `auto` written out: fed back, it makes the same run."""
        choices = {
            "micro_batch_rows": self.micro_batch_rows,
            "gradient_checkpointing": self.gradient_checkpointing,
            "optimizer": self.optimizer,
            "packing": self.packed,
        }
        return config.model_copy(
            update={
                "model": config.model.model_copy(update={"dtype": self.dtype}),
                "train": config.train.model_copy(update=choices),
            }
        )


def resolve(config: Config, hardware: Hardware, shape: Shape) -> Plan:
    """Choose dtype, checkpointing, micro-batch and optimizer for this machine."""
    dtype, dtype_reason = _dtype(config, hardware)
    base = Choices(
        gpu_gib=hardware.gpus[0].memory_gib if hardware.gpus else None,
        dtype=dtype,
        gradient_checkpointing="none",
        optimizer="adamw_torch_fused",
        packed=config.train.packing is not False,
    )
    usable_gib = USABLE_MEMORY * memory_gib(hardware)
    candidates = list(_candidates(config, base))
    one_row = {choices: full_memory(config, shape, choices, 1).total for choices in candidates}
    chosen = next((choices for choices in candidates if one_row[choices] <= usable_gib), candidates[-1])
    micro, micro_reason = _micro_batch(config, shape, chosen, usable_gib)
    train, lora = config.train, config.lora
    fastest = one_row[candidates[0]]
    settings = [
        Setting("model", f"{config.model.name}, {shape.parameters / 1e6:,.0f} M parameters"),
        *_experts(shape),
        Setting("method", _method(config)),
        Setting("dtype", dtype, dtype_reason),
        Setting("quantization", config.model.quantization),
        Setting("max length", f"{config.model.max_length:,} tokens"),
        _batch(config, micro, micro_reason),
        Setting("checkpointing", chosen.gradient_checkpointing, _recompute_reason(config, chosen, fastest, usable_gib)),
        Setting(
            "optimizer",
            f"{chosen.optimizer}, lr {train.learning_rate:g}, {train.scheduler}",
            _optimizer_reason(config, chosen, fastest, usable_gib),
        ),
    ]
    if train.method == "lora" and lora.dropout:
        settings.append(Setting("lora dropout", f"{lora.dropout:g}"))
    fits = full_memory(config, shape, chosen, micro).total <= usable_gib
    return Plan(**vars(chosen), shape=shape, micro_batch_rows=micro, fits=fits, settings=settings)


def full_memory(config: Config, shape: Shape, choices: Choices, rows: int) -> Memory:
    """The most memory that `rows` rows at once can take."""
    largest = MicroBatch.full(min(rows, config.train.batch_rows), config.model.max_length, choices.packed)
    return forecast(config, shape, choices, largest)


def memory_gib(hardware: Hardware) -> float:
    return hardware.gpus[0].memory_gib if hardware.gpus else hardware.memory_gib


def smaller(config: Config, gpu: bool) -> list[str]:
    """Settings that take less memory, the cheapest first (docs/oom.md); not those that are set already."""
    train, full = config.train, config.train.method == "full"
    recompute = "unsloth" if gpu else "full"  # "unsloth" moves activations from a GPU to the host
    ways = {
        f"train.gradient_checkpointing={recompute}": train.gradient_checkpointing not in (recompute, "unsloth"),
        "train.optimizer=adamw_8bit": gpu and full and train.optimizer != "adamw_8bit",
        f"model.max_length below {config.model.max_length:,}": True,
        "train.method=lora": full,
        "model.quantization=nf4": gpu and not full and config.model.quantization == "none",
        "a lower lora.rank": not full,
        "a smaller model, or a GPU with more memory": True,
    }
    return [way for way, possible in ways.items() if possible]


def packing(packed: bool, proof: str) -> Setting:
    """`packed`: whether rows are; `proof`: how that is known to be exact."""
    return Setting(
        "packing", *(("on", proof) if packed else ("off", "rows are padded to the longest of a micro-batch"))
    )


def price_of(config: Config, hardware: Hardware) -> tuple[float | None, Setting | None]:
    """Dollars an hour of this machine, and the setting to show; None where nobody can know."""
    if config.usd_per_hour is not None:
        return config.usd_per_hour, Setting("price", f"${config.usd_per_hour:g} an hour")
    known = machines.usd_per_hour(hardware.gpus[0].name) if hardware.gpus else None
    reason = f"an example of {machines.USD_PER_HOUR_DATE}; set usd_per_hour to yours"
    return known, Setting("price", f"${known:g} an hour", reason) if known is not None else None


def _candidates(config: Config, base: Choices) -> Iterator[Choices]:
    """What may be chosen, the fastest first: nothing recomputed, then recomputing, then with 8-bit moments."""
    asked, gpu = config.train, base.gpu_gib is not None
    optimizers, policies = [asked.optimizer], [asked.gradient_checkpointing]
    if asked.optimizer == "auto":
        optimizers = ["adamw_torch_fused"]
        optimizers += ["adamw_8bit"] if gpu and asked.method == "full" else []
    if asked.gradient_checkpointing == "auto":
        policies = ["none", "unsloth" if gpu else "full"]
    for optimizer in optimizers:
        for policy in policies:
            yield replace(base, optimizer=optimizer, gradient_checkpointing=policy)


def _micro_batch(config: Config, shape: Shape, choices: Choices, usable_gib: float) -> tuple[int, str | None]:
    """The most rows at once that fit and divide the batch."""
    rows = config.train.batch_rows
    if config.train.micro_batch_rows != "auto":
        return config.train.micro_batch_rows, None
    small = [size for size in range(1, math.isqrt(rows) + 1) if rows % size == 0]
    sizes = sorted({*small, *(rows // size for size in small)}, reverse=True)
    useful = sizes
    if choices.gpu_gib is None:
        wanted = max(1, CPU_MICRO_BATCH_TOKENS // config.model.max_length)
        useful = [size for size in sizes if size <= wanted]
    fitting = [size for size in useful if full_memory(config, shape, choices, size).total <= usable_gib]
    micro = fitting[0] if fitting else 1
    if micro == rows:
        return micro, "all rows of a step at once"
    if micro == useful[0]:
        return micro, f"a CPU gains nothing beyond {CPU_MICRO_BATCH_TOKENS:,} tokens at once"
    needed = full_memory(config, shape, choices, useful[useful.index(micro) - 1] if fitting else 1).total
    if fitting:
        return micro, f"more would need about {needed:.0f} of {usable_gib:.0f} GiB"
    return micro, f"even one full row needs about {needed:.0f} GiB, {usable_gib:.0f} GiB can be used"


def _batch(config: Config, micro: int, reason: str | None) -> Setting:
    train = config.train
    if train.packing is False:
        return Setting("batch", f"{micro} rows × {train.batch_rows // micro} = {train.batch_rows} a step", reason)
    tokens = micro * config.model.max_length
    return Setting("batch", f"{train.batch_rows} rows a step, up to {tokens:,} tokens at once", reason)


def _method(config: Config) -> str:
    lora = config.lora
    if config.train.method == "full":
        return "full fine-tuning"
    extras = (", rsLoRA" if lora.rslora else "") + (", PiSSA" if lora.init == "pissa" else "")
    return f"LoRA r {lora.rank}, alpha {lora.alpha:g}{extras}, on {len(lora.targets)} projections"


def _experts(shape: Shape) -> list[Setting]:
    if shape.experts == 1:
        return []
    return [Setting("experts", f"{shape.experts}, {shape.active_experts} of them a token", EXPERTS_UNCHECKED)]


def _dtype(config: Config, hardware: Hardware) -> tuple[str, str | None]:
    if config.model.dtype != "auto":
        return config.model.dtype, None
    if not hardware.gpus:
        return "float32", "no GPU: bf16 is emulated on most CPUs"
    gpu = hardware.gpus[0]
    if gpu.compute_capability >= (8, 0):
        return "bfloat16", f"{gpu.name} has bf16 tensor cores"
    return "float32", f"{gpu.name} (compute capability {'.'.join(map(str, gpu.compute_capability))}) has no bf16"


def _recompute_reason(config: Config, chosen: Choices, fastest_gib: float, usable_gib: float) -> str | None:
    if config.train.gradient_checkpointing != "auto":
        return None
    needs = f"a full row needs about {fastest_gib:.1f} GiB without it, {usable_gib:.0f} GiB can be used"
    return f"{needs}: recomputing would cost speed" if chosen.gradient_checkpointing == "none" else needs


def _optimizer_reason(config: Config, chosen: Choices, fastest_gib: float, usable_gib: float) -> str | None:
    if config.train.optimizer != "auto":
        return None
    if chosen.optimizer == "adamw_8bit":
        return f"exact moments need about {fastest_gib:.0f} GiB with all else, {usable_gib:.0f} GiB can be used"
    return "one kernel for all parameters"
