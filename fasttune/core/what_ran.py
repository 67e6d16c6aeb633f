"""What really runs, read from live objects: tokens of a batch, attention operators, dtypes, memory.

Needs torch only, so that arms without Unsloth are measured by the same code.
Shapes: B rows of a micro-batch, T tokens of the longest row (or of the whole packed row).
"""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint

from fasttune import metrics
from fasttune.core.precision import BY_CHANCE
from fasttune.core.shape import Shape
from fasttune.data.tokenize import IGNORE
from fasttune.metrics import Flops
from fasttune.system import native_stderr_closed

PROBED = 256  # values of every parameter that tell whether the base model is the same
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}  # of torch's and torchao's AdamW, and of bitsandbytes'
ATTENTION_OPERATORS = (
    "scaled_dot_product",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fmha",
    "flash_attn",
    "flash_fwd",
    "varlen_attn",
    "RowsAttention",
)


class AttentionSeen:
    """Profiles what is done inside `with` for its attention: `names` of its operators join those seen before."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    @property
    def operators(self) -> str:
        return attention_operator(self.names)

    def __enter__(self) -> "AttentionSeen":
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with native_stderr_closed():  # torch 2.13's profiler prints its start and stop
            self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        with native_stderr_closed():
            self._profile.stop()
        events = self._profile.profiler.kineto_results.events()  # made into Python's, they are 9 MB a layer
        self.names |= {name for event in events if is_attention(name := event.name())}
        del self._profile


class Watched:
    """Mixed in before any Hugging Face trainer: takes rows in their order, and looks at all of the first step: which
    attention ran, what was recomputed. Runs and all arms of a benchmark share it: what is timed is the same code.
    """

    seen: AttentionSeen | None = None
    step_seen: int | None = None
    recomputation_seen: str | None = None  # read while it runs: Unsloth's trainer clears the flags at its end
    state: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = super().training_step  # type: ignore[misc]
        if self.step_seen not in (None, self.state.global_step):
            return step(model, *args, **kwargs)
        self.seen, self.step_seen = self.seen or AttentionSeen(), self.state.global_step
        self.recomputation_seen = checkpointing(model)
        with self.seen:
            return step(model, *args, **kwargs)

    @property
    def attention_seen(self) -> str | None:
        """The innermost attention operators of the first step, e.g. aten::_flash_attention_forward."""
        return self.seen.operators if self.seen else None


def checkpointing(model: Any) -> str:
    """Which recomputation is live: none, full, or unsloth (activations offloaded to the host)."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "none"
    function = torch.utils.checkpoint.checkpoint
    return "unsloth" if (function.__module__ or "").startswith("unsloth") else "full"


def count_tokens(batches: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """Tokens, trained tokens, padding of the micro-batches of a step; shared: tokens that were not computed again.

    input_ids, labels: (B, T). Without an attention mask nothing is padded. The first label of a sequence is never a
    target (causal shift). A prefix that the rows of a pack share counts with every row, as it would in any layout.
    """
    cells = sum(batch["input_ids"].numel() for batch in batches)
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches if "attention_mask" in batch)
    loss_tokens = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    shared = sum(int(batch["shared_prefix"]) * (rows_of(batch) - 1) for batch in batches if "shared_prefix" in batch)
    return {
        "tokens": cells - padding + shared,
        "loss_tokens": loss_tokens,
        "padding_tokens": padding,
        "shared_tokens": shared,
    }


def rows_of(batch: dict[str, torch.Tensor]) -> int:
    """How many rows a micro-batch holds (see data.batches)."""
    return len(batch.get("packed_seq_lengths", batch["input_ids"])) - ("shared_prefix" in batch)


def attention_operator(names: set[str]) -> str:
    """The innermost attention operators among profiled names, e.g. aten::_flash_attention_forward."""
    found = sorted(filter(is_attention, names))
    inner = [name for name in found if name != "aten::scaled_dot_product_attention" and "Backward" not in name]
    return ", ".join(inner or found) or "no fused attention operator"


def is_attention(name: str) -> bool:
    return any(part in name for part in ATTENTION_OPERATORS) and not name.endswith("_backward")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak of the GPU's allocated memory, or of this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Not ru_maxrss: a process inherits that of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def restart_peak() -> float | None:
    """The peak of a GPU's memory up to now; from here it is counted anew. None on a CPU: that of the process stays."""
    if not torch.cuda.is_available():
        return None
    peak = peak_memory_gib()
    torch.cuda.reset_peak_memory_stats()
    return peak


def dtypes(model: Any, autocast: bool) -> str:
    """Dtypes of the live parameters, e.g. "float32 trained, bfloat16 frozen, bf16 autocast"."""
    weights = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    found = [f"{_names(trained)} trained"] + ([f"{_names(weights)} frozen"] if weights else [])
    return ", ".join([*found, "bf16 autocast" if autocast else "no autocast"])


def optimizer(live: Any) -> str:
    """What updates the weights and in what its moments are, e.g. "torch AdamW, moments float32"."""
    live = getattr(live, "optimizer", live)  # accelerate wraps it
    if live is None:
        return "not seen"
    values = [value for entries in live.state.values() for name, value in entries.items() if name in MOMENTS]
    moments = {"8 bit" if hasattr(value, "__tensor_flatten__") else _names({value.dtype}) for value in values}
    text = f"{type(live).__module__.partition('.')[0]} {type(live).__name__}, moments {'/'.join(sorted(moments))}"
    return text + (", bf16 rounded by chance" if getattr(live, "bf16_stochastic_round", False) else "")


def round_by_chance(trainer: Any) -> None:
    """Let a Hugging Face trainer update bf16 weights by torchao's AdamW with 8-bit moments and stochastic rounding.

    Told so only now: on a CPU Unsloth takes any "8bit" of a config for bitsandbytes' and puts another in its place.
    """
    from transformers.training_args import OptimizerNames

    trainer.args.optim, trainer.args.optim_args = OptimizerNames(BY_CHANCE), "bf16_stochastic_round=True"
    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # torchao compiles its step, for which a CPU may have no compiler


def probe(parameters: Iterable[torch.Tensor], most: int | None = None) -> str:
    """A checksum of the bits of (the first `most` values of) every parameter."""
    check = 0
    for parameter in parameters:
        values = parameter.detach().flatten()[:most].cpu().contiguous()
        check = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), check)
    return f"{check:08x}"


def weights_digest(model: Any) -> str:
    """The same for models of the same weights, whatever wraps them: of the size and the square of every parameter.

    Values count, not their dtype; packed 4-bit weights are bytes, so never the same as those that they stand for.
    """
    found = []
    for parameter in model.parameters():
        parts = parameter.detach().flatten().split(1 << 22)  # a copy of all would be the peak of the memory
        square = sum(part.double().square().sum().item() for part in parts)
        found.append(f"{parameter.numel()} {square:.9e}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def count_flops(model: Any) -> Flops | None:
    """FLOPs per token of a training step of this live model (see metrics.count_flops), from its linear layers.

    None where they do not tell: quantized weights are packed, and transformers keeps experts as one tensor, no layers.
    """
    shape = Shape.of(getattr(model.config, "get_text_config", lambda: model.config)())
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    if shape.experts > 1 or not all(module.weight.is_floating_point() for module in linear):
        return None
    return metrics.count_flops(
        linear_weights=sum(module.weight.numel() for module in linear),
        trained_weights=sum(module.weight.numel() for module in linear if module.weight.requires_grad),
        head_weights=head.weight.numel(),
        head_trained=head.weight.requires_grad,
        layers=shape.layers,
        attention_width=shape.query_width,
    )


def _names(dtypes: set[torch.dtype]) -> str:
    return "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
