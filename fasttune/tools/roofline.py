"""Where the time of a training step goes on a GPU, by group of kernels: FLOPs, bytes, ms, and what bounds it. Pure.

    table = of_step(config, chosen, sample, memory, "NVIDIA H100 80GB HBM3")

FLOPs and bytes are counted; how much of the card's peaks each kind of kernel reaches was measured once, on Llama-3.1-8B
(benchmarks/llama3.1-8b_h100_2026-11-26.md). What it is laid beside: benchmarks/profile_step.py, group by group.
"""

from fasttune import chips
from fasttune.config import Config
from fasttune.core.autoconfig import Plan
from fasttune.core.memory import BYTES, GIB, GPU_LOGIT_BYTES
from fasttune.metrics import KernelGroup, Memory, Roofline
from fasttune.tools.estimate import LAUNCH_S_A_LAYER, SMALLEST, Sample

# Of the dense peak: 691 TFLOP/s at the model's shapes. Attention by its FLOPs as metrics counts them: of rectangles
# (cuDNN) 355 TFLOP/s; of packs of many lengths 238, computed from Flash Attention 2's published rates, never measured.
MATMUL, ATTENTION_RECTANGLES, ATTENTION_PACKS = 0.70, 0.36, 0.24
MEMORY = 0.80  # of the datasheet's bandwidth: 0.73 elementwise, more where matmuls read
IDLE = 0.027  # of a step no kernel runs: 15 of 562 ms
OF_KERNELS = f"{MATMUL:.0%} of the dense peak in matmuls, {MEMORY:.0%} of the bandwidth: measured on one H100"


def of_step(config: Config, chosen: Plan, sample: Sample, memory: Memory, gpu: str) -> Roofline | None:
    """None of a card whose peaks are not known, of other weights than bf16 ones, and of small models."""
    peak, bandwidth, shape = chips.peak_bf16_tflops(gpu), chips.memory_tb_per_s(gpu), chosen.shape
    plain = chosen.dtype == "bfloat16" and config.model.quantization == "none" and shape.experts == 1
    if peak is None or bandwidth is None or not plain or shape.parameters < SMALLEST:
        return None
    rates = {"matmul": MATMUL, "attention": ATTENTION_RECTANGLES if sample.one_length else ATTENTION_PACKS}

    def group(name: str, flops: float, moved: float, kind: str = "matmul") -> KernelGroup:
        compute_s, memory_s = flops / (rates[kind] * peak * 1e12), moved / (MEMORY * bandwidth * 1e12)
        bound = kind if compute_s > memory_s else "memory"
        return KernelGroup(name, flops, moved, 1e3 * max(compute_s, memory_s), bound)

    full, layers, value = config.train.method == "full", shape.layers, BYTES[chosen.dtype]
    cells, labels = sample.cells / sample.steps, sample.labels / sample.steps
    micro_batches = len(sample.micro_batches) / sample.steps
    weights, adapter = shape.linear_weights, 0 if full else shape.adapter_weights(config.lora.rank, config.lora.targets)
    model = shape.flops(full, adapter, config.lora.train_embeddings)
    attention, head = cells * model.attention * sample.mean_length, labels * model.head
    # Values of a token that each group moves, in a layer: (forward, backward).
    through = sum(before + after for before, after in shape.projections.values())
    target_widths = [] if full else [shape.projections.get(t, (shape.hidden, shape.mlp)) for t in config.lora.targets]
    into, out = (sum(each[side] for each in target_widths) for side in (0, 1))
    lora = (into + 2 * out, 4 * into + 2 * out)  # added to the layer's output; gradients of A, B and the input
    qk = shape.query_width + shape.key_width
    attended = (2 * qk, 4 * qk)
    elementwise = (10 * shape.hidden + 2 * qk + 3 * shape.mlp, 12 * shape.hidden + 2 * qk + 6 * shape.mlp)
    token = value * layers * cells  # bytes of one value of every token and layer
    read = value * weights * micro_batches
    groups = [
        group("matmuls forward", 2 * weights * cells, read + token * through),
        group("matmuls backward", (4 if full else 2) * weights * cells, (2 if full else 1) * (read + token * through)),
        group("head", head, value * (labels * shape.hidden + 2 * shape.vocab * shape.hidden * micro_batches)),
        group("cross entropy", 0.0, labels * shape.vocab * GPU_LOGIT_BYTES),
        group("LoRA", 6 * adapter * cells, token * sum(lora)),
        group("attention", attention, token * sum(attended), "attention"),
        group("elementwise", 0.0, token * sum(elementwise)),
    ]
    if chosen.gradient_checkpointing != "none":
        groups += [
            group("again: matmuls", 2 * weights * cells, read + token * through),
            group("again: LoRA", 2 * adapter * cells, token * lora[0]),
            group("again: attention", attention / 3, token * attended[0], "attention"),
            group("again: elementwise", 0.0, token * elementwise[0]),
        ]
    trained, gradients = memory.weights if full else memory.adapter, memory.gradients
    added_up = 3 * gradients * micro_batches  # what a micro-batch gives is read, added, and written
    groups.append(group("optimizer", 0.0, GIB * (2 * trained + added_up + gradients + 2 * memory.optimizer)))
    groups = [each for each in groups if each.ms]
    busy_ms = sum(each.ms for each in groups)
    launches_ms = 1e3 * LAUNCH_S_A_LAYER.expected * layers * micro_batches  # of a small model: longer than its kernels
    ms, tokens = max(busy_ms / (1 - IDLE), launches_ms), sample.tokens / sample.steps
    groups.append(KernelGroup("between kernels", 0.0, 0.0, ms - busy_ms, "launches"))
    return Roofline(groups, tokens, ms, 1e3 * tokens / ms, OF_KERNELS)
