"""Config + hardware → settings, each with its reason: what `auto` means on this machine.

Pure functions; no torch. Memory is estimated, in GiB; issue a run to measure it.
"""

from dataclasses import dataclass
from typing import Any

from fasttune.config import Config
from fasttune.hardware import Hardware
from fasttune.metrics import Setting

USABLE_MEMORY = 0.8  # the rest: fragmentation, CUDA context, kernels' workspaces
ACTIVATION_VALUES = 17  # saved values per token, layer and hidden unit: (34 s·b·h bytes at 2 bytes each)
# Source: Korthikanti et al., https://arxiv.org/abs/2205.05198, eq. 1 without the attention square (flash attention).
CPU_MICRO_BATCH_TOKENS = 2048
LOGIT_BYTES = 8  # fp32 logits and their gradient on a labelled token, if nothing chunks them


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory."""

    layers: int
    hidden: int
    vocab: int
    parameters: int

    @classmethod
    def of(cls, architecture: Any) -> "Shape":
        """From a transformers config; parameters of a Llama-like model (attention, gated MLP, embeddings)."""
        hidden, layers = architecture.hidden_size, architecture.num_hidden_layers
        heads = architecture.num_attention_heads
        head = getattr(architecture, "head_dim", None) or hidden // heads
        kv_heads = getattr(architecture, "num_key_value_heads", None) or heads
        mlp = getattr(architecture, "intermediate_size", None) or 4 * hidden
        layer = hidden * head * (2 * heads + 2 * kv_heads) + 3 * hidden * mlp
        embeddings = architecture.vocab_size * hidden * (1 if architecture.tie_word_embeddings else 2)
        return cls(layers, hidden, architecture.vocab_size, layers * layer + embeddings)


@dataclass(frozen=True)
class Plan:
    """Every automatic choice made; `settings` is what a person is shown."""

    shape: Shape
    dtype: str
    micro_batch_rows: int
    gradient_checkpointing: str
    optimizer: str
    packed: bool  # as wished; prepare.py asks the live model whether it can
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
    optimizer, optimizer_reason = _optimizer(config, hardware, shape, dtype)
    policy, policy_reason = _checkpointing(config, hardware, shape, dtype, optimizer)
    micro, micro_reason = _micro_batch(config, hardware, shape, dtype, policy, optimizer)
    train, lora = config.train, config.lora
    settings = [
        Setting("model", f"{config.model.name}, {shape.parameters / 1e6:,.0f} M parameters"),
        Setting("method", _method(config)),
        Setting("dtype", dtype, dtype_reason),
        Setting("quantization", config.model.quantization),
        Setting("max length", f"{config.model.max_length:,} tokens"),
        _batch(config, micro, micro_reason),
        Setting("checkpointing", policy, policy_reason),
        Setting("optimizer", f"{optimizer}, lr {train.learning_rate:g}, {train.scheduler}", optimizer_reason),
    ]
    if train.method == "lora" and lora.dropout:
        settings.append(Setting("lora dropout", f"{lora.dropout:g}"))
    return Plan(shape, dtype, micro, policy, optimizer, train.packing is not False, settings)


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


def _dtype(config: Config, hardware: Hardware) -> tuple[str, str | None]:
    if config.model.dtype != "auto":
        return config.model.dtype, None
    if not hardware.gpus:
        return "float32", "no GPU: bf16 is emulated on most CPUs"
    gpu = hardware.gpus[0]
    if gpu.compute_capability >= (8, 0):
        return "bfloat16", f"{gpu.name} has bf16 tensor cores"
    return "float32", f"{gpu.name} (compute capability {'.'.join(map(str, gpu.compute_capability))}) has no bf16"


def _optimizer(config: Config, hardware: Hardware, shape: Shape, dtype: str) -> tuple[str, str | None]:
    chosen = config.train.optimizer
    if chosen != "auto":
        return chosen, None
    full_gib = _fixed_gib(config, shape, dtype, "adamw_torch_fused")
    memory_gib = _memory_gib(hardware)
    if hardware.gpus and config.train.method == "full" and full_gib > USABLE_MEMORY * memory_gib:
        return "adamw_8bit", f"weights, gradients and fp32 states need {full_gib:.0f} of {memory_gib:.0f} GiB"
    return "adamw_torch_fused", "one kernel for all parameters"


def _checkpointing(
    config: Config, hardware: Hardware, shape: Shape, dtype: str, optimizer: str
) -> tuple[str, str | None]:
    chosen = config.train.gradient_checkpointing
    if chosen != "auto":
        return chosen, None
    row_gib = config.model.max_length * _token_bytes(shape, dtype, recompute=False) / 2**30
    free_gib = USABLE_MEMORY * _memory_gib(hardware) - _fixed_gib(config, shape, dtype, optimizer)
    if row_gib <= free_gib:
        return "none", f"a full row needs about {row_gib:.1f} of {free_gib:.0f} GiB free: recomputing would cost speed"
    policy = "unsloth" if hardware.gpus else "full"
    return policy, f"a full row needs about {row_gib:.1f} GiB without it, {max(free_gib, 0):.0f} GiB are free"


def _micro_batch(
    config: Config, hardware: Hardware, shape: Shape, dtype: str, policy: str, optimizer: str
) -> tuple[int, str | None]:
    rows = config.train.batch_rows
    if config.train.micro_batch_rows != "auto":
        return config.train.micro_batch_rows, None
    free_gib = USABLE_MEMORY * _memory_gib(hardware) - _fixed_gib(config, shape, dtype, optimizer)
    fitting = int(max(free_gib, 0) * 2**30 / _token_bytes(shape, dtype, recompute=policy != "none"))
    limit, why = fitting, f"about {fitting:,} tokens fit in {max(free_gib, 0):.0f} GiB"
    if not hardware.gpus and fitting > CPU_MICRO_BATCH_TOKENS:
        limit, why = CPU_MICRO_BATCH_TOKENS, f"a CPU gains nothing beyond {CPU_MICRO_BATCH_TOKENS:,} tokens at once"
    wanted = max(1, limit // config.model.max_length)
    micro = max(size for size in range(1, min(wanted, rows) + 1) if rows % size == 0)
    return micro, "all rows of a step at once" if micro == rows else why


def _memory_gib(hardware: Hardware) -> float:
    return hardware.gpus[0].memory_gib if hardware.gpus else hardware.memory_gib


def _fixed_gib(config: Config, shape: Shape, dtype: str, optimizer: str) -> float:
    """Weights, gradients and optimizer states; an adapter's own are small and left to the slack."""
    weight_bytes = 0.6 if config.model.quantization == "nf4" else {"bfloat16": 2, "float32": 4}[dtype]
    if config.train.method == "full":
        states = 2 if optimizer == "adamw_8bit" else 2 * {"bfloat16": 2, "float32": 4}[dtype]
        weight_bytes += {"bfloat16": 2, "float32": 4}[dtype] + states
    return shape.parameters * weight_bytes / 2**30


def _token_bytes(shape: Shape, dtype: str, recompute: bool) -> float:
    value_bytes = {"bfloat16": 2, "float32": 4}[dtype]
    saved = 1 if recompute else ACTIVATION_VALUES
    return shape.layers * shape.hidden * saved * value_bytes + shape.vocab * LOGIT_BYTES
