"""Peak memory of a run by part, before it runs: counted from what is kept for backward. Pure, no torch.

    memory = forecast(config, shape, choices, MicroBatch.full(rows=4, max_length=2048, packed=True))

On a CPU it is the resident memory of the process, in fp32, and checked against measured peaks
(benchmarks/results/forecast-error.jsonl). On a GPU it is what torch allocates, counted the same way from the tensors
that Unsloth's kernels save; two constants of it were chosen on two runs of one H100, and shown on none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fasttune.config import Config
from fasttune.core.shape import Shape
from fasttune.metrics import Memory

GIB = 2**30
BYTES = {"bfloat16": 2, "float32": 4}
NF4_BYTES = 0.53  # 4 bits and a constant of 8 bits for 64 weights: https://arxiv.org/abs/2305.14314, section 3
# Of the kernels for a CPU, which import them from here: this file imports no torch.
BLOCK = 64  # queries at once (rows_attention)
KEPT = 512  # rows longer than this compute their probabilities again backward: kept, they would be T² of memory
RANK_MULTIPLE = 16  # to which a rank is filled up (fused_lora): one of 8 costs the BLAS three times the time of 16
CPU_LOGIT_VALUES = 16 * 2**20  # of one chunk of Unsloth's cross entropy on a CPU (unsloth_zoo.cpu.ops)
# A logit, and at most (chosen on two runs: benchmarks/llama3.1-8b_h100_2026-11-26.md). 4 GiB, what the chunks of
# unsloth_zoo.fused_losses.cross_entropy_loss may take, was 8 and 14 % too high in all.
GPU_LOGIT_BYTES, GPU_LOGIT_GIB = 16, 1.0
# Measured on a CPU, see docs/LOG.md: Python, torch, transformers and Unsloth; a tokenizer, by entry.
CPU_PROCESS_GIB, TOKEN_BYTES = 0.62, 1600
# What glibc cannot give again after some twenty steps: what so many layers keep, and a share of a tensor for every
# moment of an adapter, which lie all over the heap; a larger one where layers are computed again between them.
CPU_LAYERS, CPU_PINNED, CPU_PINNED_AGAIN = 2, 0.08, 0.18
GPU_SLACK = 0.05  # of activations and logits, chosen on the same two runs


@dataclass(frozen=True)
class Choices:
    """What decides the memory besides the model and the config."""

    gpu_gib: float | None  # memory of the GPU; None: a CPU
    dtype: str
    gradient_checkpointing: str
    optimizer: str
    packed: bool


@dataclass(frozen=True)
class MicroBatch:
    """What is computed at once. probabilities: entries of the attention that a head keeps on a CPU; mask: if padded."""

    tokens: int
    labels: int
    probabilities: int
    mask: int

    @classmethod
    def full(cls, rows: int, max_length: int, packed: bool) -> "MicroBatch":
        """The most that can come: full rows, every token of them learned."""
        tokens = rows * max_length
        kept = rows * _probabilities(max_length, 0) if packed else 0
        return cls(tokens, tokens, kept, 0 if packed else rows * max_length**2)

    @classmethod
    def of(cls, batch: Mapping[str, Any], ignore: int) -> "MicroBatch":
        """Of arrays as data.batches makes them; labels that are `ignore` are not learned."""
        rows, length = batch["input_ids"].shape
        lengths, prefix = batch.get("packed_seq_lengths"), int(batch.get("shared_prefix", 0))
        kept = 0
        for at, own in enumerate([] if lengths is None else lengths.tolist()):
            kept += _probabilities(own, prefix if at else 0)
        labels = int((batch["labels"][:, 1:] != ignore).sum())
        return cls(rows * length, labels, kept, rows * length**2 if lengths is None else 0)


def forecast(config: Config, shape: Shape, choices: Choices, largest: MicroBatch) -> Memory:
    """GiB by part at the peak of a run whose largest micro-batch is `largest`."""
    full, value_bytes = config.train.method == "full", BYTES[choices.dtype]
    weight_bytes = NF4_BYTES if config.model.quantization == "nf4" else value_bytes
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)  # never quantized
    weights = (shape.parameters - embeddings) * weight_bytes + embeddings * value_bytes
    adapter = 0 if full else shape.adapter_weights(config.lora.rank, config.lora.targets)
    trained_bytes = value_bytes if full else 4  # an adapter is trained in fp32
    trained = shape.parameters if full else adapter
    moment_bytes = 2 if choices.optimizer == "adamw_8bit" else 2 * trained_bytes
    activations = _activations(config, shape.computed, choices, largest)
    held = weights + adapter * 4 + trained * (trained_bytes + moment_bytes) + activations
    logits = _logits(shape, choices, largest, full, held)
    moments = trained * moment_bytes
    slack, process = GPU_SLACK * (activations + logits), 0.0
    if choices.gpu_gib is None:
        slack = _cpu_slack(config, shape.computed, choices, largest, activations)
        process = CPU_PROCESS_GIB + shape.vocab * TOKEN_BYTES / GIB
    return Memory(
        process=process,
        weights=weights / GIB,
        adapter=adapter * 4 / GIB,
        gradients=trained * trained_bytes / GIB,
        optimizer=moments / GIB,
        activations=activations / GIB,
        logits=logits / GIB,
        slack=slack / GIB,
    )


def _activations(config: Config, shape: Shape, choices: Choices, micro: MicroBatch) -> float:
    """Bytes kept for backward: of every layer, or of one and the input of each where the rest is computed again."""
    layer = _layer_bytes(config, shape, choices, micro)
    if choices.gradient_checkpointing == "none":
        return shape.layers * layer
    inputs = shape.hidden * micro.tokens * BYTES[choices.dtype]
    kept_inputs = 2 if choices.gradient_checkpointing == "unsloth" else shape.layers  # "unsloth" moves them to the host
    return layer + kept_inputs * inputs


def _layer_bytes(config: Config, shape: Shape, choices: Choices, micro: MicroBatch) -> float:
    """Bytes a decoder layer keeps. Two norms: input and output; attention: q, k, v, its output; MLP: see below."""
    full, value_bytes = config.train.method == "full", BYTES[choices.dtype]
    values = 4 * shape.hidden + 2 * shape.query_width + 2 * shape.key_width
    known = [shape.projections[name][0] for name in config.lora.targets if name in shape.projections]
    dropped = sum(known) if not full and config.lora.dropout else 0
    if choices.gpu_gib is not None:
        values += 2 * shape.mlp  # gate and up; Unsloth's MLP computes their product again
        return micro.tokens * (values * value_bytes + dropped)  # a mask of a byte each
    values += 4 * shape.mlp  # gate, its silu, up, the product
    if full:
        values += 2 * shape.hidden  # what each norm's weight is multiplied by
    elif dropped:  # PEFT's own layers: an input of each, dropped out, and its noise; the inputs themselves are not kept
        values += 2 * dropped - 2 * shape.hidden - shape.mlp
    else:
        rank = -(-config.lora.rank // RANK_MULTIPLE) * RANK_MULTIPLE
        values += rank * len(config.lora.targets)
    if not choices.packed:
        values += 2 * (shape.query_width - shape.key_width)  # keys and values are repeated for every head
    return 4 * (micro.tokens * values + shape.heads * micro.probabilities + micro.mask)


def _cpu_slack(config: Config, shape: Shape, choices: Choices, micro: MicroBatch, activations: float) -> float:
    """Bytes of a layer's gradients while they are made, and of the heap's holes, which whole moments fill."""
    gradients = 4 * micro.tokens * (4 * shape.mlp + 3 * shape.hidden)
    again = choices.gradient_checkpointing != "none"
    unfused = 3 if config.train.method == "lora" and config.lora.dropout else 1  # PEFT's own layers make more tensors
    layers = 0 if again else CPU_LAYERS * unfused * activations / shape.layers
    pinned = CPU_PINNED_AGAIN if again else CPU_PINNED
    if config.train.method == "full":
        return gradients + layers
    kept = 4 * (shape.hidden + shape.mlp) + 2 * (shape.query_width + shape.key_width)
    mean_tensor = 4 * micro.tokens * kept / 12
    moments = 2 * 2 * shape.layers * len(config.lora.targets)
    return gradients + layers + pinned * moments * mean_tensor


def _logits(shape: Shape, choices: Choices, micro: MicroBatch, full: bool, held: float) -> float:
    """Bytes of the chunks in which Unsloth computes the loss; a trained head has a gradient of its own there.

    held: bytes of all else. On a GPU a chunk takes at most half of what is free.
    """
    if choices.gpu_gib is not None:
        free = max(choices.gpu_gib * GIB - held, 0)
        return min(micro.tokens * shape.vocab * GPU_LOGIT_BYTES, GPU_LOGIT_GIB * GIB, free / 2)
    chunks = 4 * min(micro.labels * shape.vocab, 2 * CPU_LOGIT_VALUES)  # the next is made before the last is freed
    return chunks + (4 * shape.vocab * shape.hidden if full else 0)


def _probabilities(length: int, prefix: int) -> int:
    """Entries of the attention that a head keeps of a row behind a prefix, block by block."""
    if length > KEPT:
        return 0
    return sum(min(BLOCK, length - at) * (prefix + min(at + BLOCK, length)) for at in range(0, length, BLOCK))
