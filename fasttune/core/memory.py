"""Peak memory of a run by part, before it runs: counted from what is kept for backward. Pure, no torch.

    memory = forecast(config, Shape.of(architecture), choices, Workload.full(rows=4, max_length=2048, packed=True))

On a CPU it is the resident memory of the process, in fp32, and checked against measured peaks
(benchmarks/results/forecast-error.jsonl). On a GPU it is what torch allocates, counted the same way from the tensors
that Unsloth's kernels save; two constants of it were chosen on two runs of one H100; a third was forecast 6 % too high.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fasttune import metrics
from fasttune.config import Config
from fasttune.cpu import BLOCK, KEPT, RANK_MULTIPLE
from fasttune.errors import ModelError
from fasttune.metrics import Flops, Memory
from fasttune.settings import RESIDUAL

GIB = 2**30
BYTES = {"bfloat16": 2, "float32": 4}
NF4_BYTES = 0.53  # 4 bits and a constant of 8 bits for 64 weights: https://arxiv.org/abs/2305.14314, section 3
TOGETHER_LAYERS = 2  # of a divided model: the one that is computed and the next; embeddings and head are always whole
CPU_LOGIT_VALUES = 16 * 2**20  # of one chunk of Unsloth's cross entropy on a CPU (unsloth_zoo.cpu.ops)
# A logit, and at most (chosen on two runs: benchmarks/llama3.1-8b_h100_2026-11-26.md). 4 GiB, what the chunks of
# unsloth_zoo.fused_losses.cross_entropy_loss may take, was 8 and 14 % too high in all.
GPU_LOGIT_BYTES, GPU_LOGIT_GIB = 16, 1.0
GPU_SLACK = 0.05  # of activations and logits, chosen on the same two runs
# Measured on a CPU, see docs/LOG.md: Python, torch, transformers and Unsloth; a tokenizer, by entry.
CPU_PROCESS_GIB, TOKEN_BYTES = 0.62, 1600
# What glibc cannot give again after some twenty steps: what so many layers keep, and a share of a tensor for every
# moment of an adapter, which lie all over the heap; a larger one where layers are recomputed between them.
CPU_LAYERS, CPU_PINNED, CPU_PINNED_RECOMPUTED = 2, 0.08, 0.18

NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as Qwen, Mixtral and DeepSeek call them
MLP = ("gate_proj", "up_proj", "down_proj")
PAGED = "paged_adamw_8bit"
EIGHT_BIT = ("adamw_8bit", PAGED)
STOCHASTIC_ADAMW = "adamw_torch_8bit"  # Hugging Face's name of torchao's optimizer


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder, from its config.json alone: attention with grouped keys, gated MLP, embeddings and head.

    Widths are values a token.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    query_width: int  # heads × head_dim
    key_width: int  # key heads × head_dim
    vocab: int
    tied: bool  # the head is the embedding
    experts: int = 1  # MLPs of a layer, each `mlp` wide
    active_experts: int = 1  # of them, those that a token runs through

    @classmethod
    def of(cls, architecture: Any) -> "Shape":
        """From a transformers config. Raises ModelError where it does not say a size."""

        def size(name: str, otherwise: int = 0) -> int:
            return getattr(architecture, name, None) or otherwise

        if missing := [name for name in NEEDED if not size(name)]:
            kind = getattr(architecture, "model_type", "unknown")
            raise ModelError(
                f"model.name: its config.json ({kind}) has no {', '.join(missing)}, which its size depends on; "
                "choose a decoder with attention"
            )
        hidden, heads = architecture.hidden_size, architecture.num_attention_heads
        head = size("head_dim", hidden // heads)
        mlp = size("intermediate_size", 4 * hidden)
        routed, shared = max(size(name, 1) for name in EXPERTS), 0
        if routed > 1:
            mlp = size("moe_intermediate_size", mlp)
            shared = size("n_shared_experts") - (-size("shared_expert_intermediate_size") // mlp)
        return cls(
            layers=architecture.num_hidden_layers,
            hidden=hidden,
            mlp=mlp,
            heads=heads,
            query_width=heads * head,
            key_width=size("num_key_value_heads", heads) * head,
            vocab=architecture.vocab_size,
            tied=bool(getattr(architecture, "tie_word_embeddings", False)),
            experts=routed + shared,
            active_experts=size("num_experts_per_tok", routed) + shared,
        )

    @property
    def computed(self) -> "Shape":
        """The dense model that a token runs through: an MLP as wide as its active experts together."""
        return replace(self, mlp=self.mlp * self.active_experts, experts=1, active_experts=1)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a decoder layer."""
        attention = {"q_proj": (self.hidden, self.query_width), "o_proj": (self.query_width, self.hidden)}
        attention |= dict.fromkeys(("k_proj", "v_proj"), (self.hidden, self.key_width))
        mlp = dict.fromkeys(("gate_proj", "up_proj"), (self.hidden, self.mlp))
        return attention | mlp | {"down_proj": (self.mlp, self.hidden)}

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of the decoder, the head left out."""
        sizes = self.projections.items()
        return self.layers * sum(self._copies(name) * before * after for name, (before, after) in sizes)

    @property
    def parameters(self) -> int:
        return self.linear_weights + (2 * self.layers + 1) * self.hidden + self.end_weights

    @property
    def end_weights(self) -> int:
        """Weights of embeddings and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def trained_weights(self, config: Config) -> int:
        """Weights that a run trains."""
        if config.train.method == "full":
            return self.parameters
        adapter = self.adapter_weights(config.lora.rank, config.lora.targets)
        return adapter + (self.end_weights if config.lora.train_embeddings else 0)

    def adapter_weights(self, rank: int, targets: list[str]) -> int:
        """Weights of a LoRA adapter; a target with a name of its own counts as the widest."""
        widest = (self.hidden, self.mlp)
        sums = (self._copies(target) * sum(self.projections.get(target, widest)) for target in targets)
        return self.layers * rank * sum(sums)

    def _copies(self, projection: str) -> int:
        return self.experts if projection in MLP else 1

    def flops(self, full: bool, adapter_weights: int, head_trained: bool = False) -> Flops:
        """FLOPs per token of a training step, as metrics.count_flops counts them for the live model."""
        return metrics.count_flops(
            linear_weights=self.linear_weights + adapter_weights,
            trained_weights=self.linear_weights if full else adapter_weights,
            head_weights=self.vocab * self.hidden,
            head_trained=full or head_trained,
            layers=self.layers,
            attention_width=self.query_width,
        )


@dataclass(frozen=True)
class Choices:
    """What decides the memory besides the model and the adapter.

    A bf16 value has 8 significant bits: what changes it by less than about 1/400 of itself is rounded away, and so is
    most of what AdamW does at the learning rates of full fine-tuning. So no trained weight is plain bf16.
    """

    gpu_gib: float | None  # memory of the GPU; None: a CPU
    method: str
    dtype: str
    gradient_checkpointing: str
    optimizer: str
    packed: bool
    parts: int  # that the weights are divided into, one on each process

    @classmethod
    def of(cls, config: Config, gpu_gib: float | None = None, parts: int = 1) -> "Choices":
        """As the config says, an `auto` too."""
        train = config.train
        job = (train.method, config.model.dtype, train.gradient_checkpointing, train.optimizer)
        return cls(gpu_gib, *job, packed=train.packing is not False, parts=parts)

    @property
    def fp32_masters(self) -> bool:
        """Whether the trained weights are held in fp32, and computed with in bf16 (autocast)."""
        return self._full_in_bf16 and self.optimizer != "adamw_8bit"

    @property
    def stochastic_rounding(self) -> bool:
        """Whether bf16 weights are trained, each update rounded up or down by chance, right on average (torchao).

        Where only 8-bit moments fit. Source: https://arxiv.org/abs/2010.06192
        """
        return self._full_in_bf16 and self.optimizer == "adamw_8bit"

    @property
    def _full_in_bf16(self) -> bool:
        return self.method == "full" and self.dtype == "bfloat16"


@dataclass(frozen=True)
class Workload:
    """How much is computed at once, in a micro-batch.

    probabilities: entries of the attention that a head keeps on a CPU; mask: entries of it, if rows are padded.
    """

    tokens: int
    labels: int
    probabilities: int
    mask: int

    @classmethod
    def full(cls, rows: int, max_length: int, packed: bool) -> "Workload":
        """The most that can come: full rows, every token of them supervised."""
        tokens = rows * max_length
        kept = rows * _probabilities(max_length, 0) if packed else 0
        return cls(tokens, tokens, kept, 0 if packed else rows * max_length**2)

    @classmethod
    def of(cls, batch: Mapping[str, Any], ignore: int) -> "Workload":
        """Of arrays as data.batching makes them; labels that are `ignore` are not supervised."""
        rows, length = batch["input_ids"].shape
        lengths, kept = batch.get("packed_seq_lengths"), 0
        if lengths is not None:
            starts = batch["position_ids"][0][np.cumsum(lengths) - lengths]  # of a segment, in its rows
            kept = sum(map(_probabilities, lengths.tolist(), starts.tolist()))
        labels = int((batch["labels"][:, 1:] != ignore).sum())
        return cls(rows * length, labels, kept, rows * length**2 if lengths is None else 0)


def forecast(config: Config, shape: Shape, choices: Choices, largest: Workload) -> Memory:
    """GiB by part at the peak of a run whose largest micro-batch is `largest`."""
    full, on_cpu = choices.method == "full", choices.gpu_gib is None
    value_bytes = 4 if choices.fp32_masters else BYTES[choices.dtype]
    weight_bytes = NF4_BYTES if config.model.quantization == "nf4" else value_bytes
    embeddings = shape.end_weights  # never quantized
    weights: float = (shape.parameters - embeddings) * weight_bytes + embeddings * value_bytes
    if choices.fp32_masters and choices.parts == 1:  # autocast keeps what it has made bf16 of: every matrix
        weights += 2 * (shape.linear_weights + shape.vocab * shape.hidden)
    trained, ends = shape.trained_weights(config), embeddings if config.lora.train_embeddings else 0
    if ends and choices.dtype == "bfloat16":
        weights += 2 * shape.vocab * shape.hidden  # autocast makes a bf16 copy of the head
    trained_bytes = value_bytes if full else 4  # an adapter is trained in fp32
    copies = 2 if config.lora.init in RESIDUAL else 1  # what it began with is loaded again to save it
    adapter: float = 0 if full else trained * 4 * copies
    if on_cpu and copies == 2 and not full:  # what is left of a weight is new; the file's pages stay mapped
        split = (shape.projections[name] for name in config.lora.targets if name in shape.projections)
        weights += 4 * shape.layers * sum(width * out for width, out in split)
    gradients: float = trained * trained_bytes
    eight_bit = choices.optimizer in EIGHT_BIT
    moments: float = trained * (2 if eight_bit else 2 * trained_bytes)
    if eight_bit and (ends or (full and not choices.stochastic_rounding)):
        moments += shape.vocab * shape.hidden * (8 - 2)  # a Hugging Face trainer keeps those of embeddings in fp32
    if (parts := choices.parts) > 1:
        together = embeddings + TOGETHER_LAYERS * shape.linear_weights / shape.layers
        together *= BYTES[choices.dtype] + (4 if full else 0)  # and what is added up of their gradients
        weights, adapter, gradients, moments = weights / parts, adapter / parts, gradients / parts, moments / parts
        weights += together
    activations = _activations(config, shape.computed, choices, largest)
    logits: float
    if on_cpu:
        logits = 4 * min(largest.labels * shape.vocab, 2 * CPU_LOGIT_VALUES)  # a chunk is made before the last is freed
        logits += (
            4 * shape.vocab * shape.hidden if full or ends else 0
        )  # a trained head has a gradient of its own there
        slack = _cpu_slack(config, shape.computed, choices, largest, activations)
    else:  # a chunk of logits takes at most half of what is free
        free = max((choices.gpu_gib or 0) * GIB - (weights + adapter + gradients + moments + activations), 0)
        logits = min(largest.tokens * shape.vocab * GPU_LOGIT_BYTES, GPU_LOGIT_GIB * GIB, free / 2)
        slack = GPU_SLACK * (activations + logits)
    return Memory(
        process=CPU_PROCESS_GIB + shape.vocab * TOKEN_BYTES / GIB if on_cpu else 0.0,
        weights=weights / GIB,
        adapter=adapter / GIB,
        gradients=gradients / GIB,
        optimizer=moments / GIB,
        activations=activations / GIB,
        logits=logits / GIB,
        slack=slack / GIB,
    )


def _activations(config: Config, shape: Shape, choices: Choices, load: Workload) -> float:
    """Bytes kept for backward: of every layer, or of one and the input of each where the rest is recomputed."""
    layer = _gpu_layer(config, shape, choices, load) if choices.gpu_gib else _cpu_layer(config, shape, choices, load)
    if choices.gradient_checkpointing == "none":
        return shape.layers * layer
    inputs = shape.hidden * load.tokens * (4 if choices.fp32_masters else BYTES[choices.dtype])
    kept_inputs = 2 if choices.gradient_checkpointing == "unsloth" else shape.layers  # "unsloth" moves them to the host
    return layer + kept_inputs * inputs


def _values(shape: Shape) -> int:
    """Of a token, that every layer keeps: input and output of two norms; q, k, v and the output of attention."""
    return 4 * shape.hidden + 2 * shape.query_width + 2 * shape.key_width


def _dropped(config: Config, shape: Shape, choices: Choices) -> int:
    """Values of a token that a layer's adapters drop out, where they do."""
    known = [shape.projections[name][0] for name in config.lora.targets if name in shape.projections]
    return sum(known) if choices.method == "lora" and config.lora.dropout else 0


def _gpu_layer(config: Config, shape: Shape, choices: Choices, load: Workload) -> float:
    """Bytes a decoder layer keeps on a GPU: Unsloth's MLP keeps gate and up, and recomputes their product."""
    values = _values(shape) + 2 * shape.mlp
    values += 2 * shape.hidden if choices.fp32_masters else 0  # fp32 weights add fp32: the norms' inputs
    return load.tokens * (values * BYTES[choices.dtype] + _dropped(config, shape, choices))  # a mask of a byte each


def _cpu_layer(config: Config, shape: Shape, choices: Choices, load: Workload) -> float:
    """Bytes a decoder layer keeps on a CPU: gate, its silu, up and the product of the MLP."""
    values = _values(shape) + 4 * shape.mlp
    if choices.method == "full":
        values += 2 * shape.hidden  # what each norm's weight is multiplied by
    elif dropped := _dropped(config, shape, choices):
        # PEFT's own layers: an input of each, dropped out, and its noise; the inputs themselves are not kept
        values += 2 * dropped - 2 * shape.hidden - shape.mlp
    else:
        rank = -(-config.lora.rank // RANK_MULTIPLE) * RANK_MULTIPLE
        values += rank * len(config.lora.targets)
    if not choices.packed:
        values += 2 * (shape.query_width - shape.key_width)  # keys and values are repeated for every head
    return 4 * (load.tokens * values + shape.heads * load.probabilities + load.mask)


def _cpu_slack(config: Config, shape: Shape, choices: Choices, load: Workload, activations: float) -> float:
    """Bytes of a layer's gradients while they are made, and of the heap's holes, which whole moments fill."""
    gradients = 4 * load.tokens * (4 * shape.mlp + 3 * shape.hidden)
    recomputed, full = choices.gradient_checkpointing != "none", choices.method == "full"
    unfused = 3 if config.lora.dropout and not full else 1  # PEFT's own layers make more tensors
    layers = 0 if recomputed else CPU_LAYERS * unfused * activations / shape.layers
    if full:
        return gradients + layers
    kept = 4 * (shape.hidden + shape.mlp) + 2 * (shape.query_width + shape.key_width)
    mean_tensor = 4 * load.tokens * kept / 12
    moments = 2 * 2 * shape.layers * len(config.lora.targets)
    return gradients + layers + (CPU_PINNED_RECOMPUTED if recomputed else CPU_PINNED) * moments * mean_tensor


def _probabilities(length: int, before: int) -> int:
    """Entries of the attention that a head keeps of a segment behind so many tokens, block by block."""
    if before + length > KEPT:
        return 0
    return sum(min(BLOCK, length - at) * (before + min(at + BLOCK, length)) for at in range(0, length, BLOCK))
