"""`python kernel_numbers.py`: Unsloth's kernels for a GPU beside the same in float64, forward and backward.

One JSON document on stdout: {"rms_norm": {"float32": {"out0": error, "dx": error, …}, …}, …}, where an error is
‖ours − exact‖ / ‖exact‖, and exact is computed from the same rounded inputs. Shapes are small and fill no block.
"""

# isort: skip_file
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import interpreted  # noqa: F401  before torch and peft

import peft
import torch
import torch.nn.functional as F
from unsloth.kernels import cross_entropy_loss, fast_lora, rms_layernorm, rope_embedding, swiglu as swiglus

Tensors = dict[str, torch.Tensor]
Function = Callable[..., tuple[torch.Tensor, ...]]
TOKENS, HIDDEN, WIDTH, EPS = 37, 192, 352, 1e-5
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
ROWS = [20, 1, 16]  # of a pack: positions begin anew in each


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape)).to(dtype)


def compare(ours: Function, exactly: Function, inputs: Tensors) -> dict[str, float]:
    """Errors of what `ours` returns, and of the gradients of `inputs`."""
    sides = []
    for function, wider in ((ours, False), (exactly, True)):
        leaves = {name: (x.double() if wider else x.clone()).requires_grad_() for name, x in inputs.items()}
        outputs = function(*(leaf * 1 for leaf in leaves.values()))  # times one: some kernels write into their input
        sides.append(with_gradients(outputs, leaves, next(iter(inputs.values())).dtype))
    return errors(*sides)


def with_gradients(outputs: tuple[torch.Tensor, ...], leaves: Tensors, dtype: torch.dtype) -> Tensors:
    """The outputs, and the gradients of the leaves for gradients of the outputs that are the same in every call."""
    found = {f"out{i}": out.detach().clone() for i, out in enumerate(outputs)}
    torch.manual_seed(1)
    upstream = [normal(*out.shape, dtype=dtype).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def errors(ours: Tensors, exact: Tensors) -> dict[str, float]:
    assert ours.keys() == exact.keys()
    norm = torch.linalg.vector_norm
    return {name: float(norm(ours[name].double() - exact[name]) / norm(exact[name])) for name in ours}


def rms_norm(dtype: torch.dtype) -> dict[str, float]:
    def exactly(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS),)

    def ours(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rms_layernorm.Fast_RMS_Layernorm.apply(x, w, EPS, False),)

    x, w = normal(1, TOKENS, HIDDEN, dtype=dtype), 1 + normal(HIDDEN, dtype=dtype, scale=0.1)
    return compare(ours, exactly, {"x": x, "w": w})


def swiglu(dtype: torch.dtype) -> dict[str, float]:
    """The backward kernel also recomputes the output, for the weight gradient of what follows."""
    gate, up, upstream = (normal(TOKENS, WIDTH, dtype=dtype) for _ in range(3))
    e, g = (x.double().requires_grad_() for x in (gate, up))
    exact = F.silu(e) * g
    exact.backward(upstream.double())
    out = swiglus.swiglu_fg_kernel(gate[None], up[None])[0]
    again, d_up, d_gate = swiglus.swiglu_DWf_DW_dfg_kernel(upstream.clone(), gate.clone(), up.clone())
    ours = {"out0": out, "out0 in backward": again, "dup": d_up, "dgate": d_gate}
    return errors(ours, {"out0": exact, "out0 in backward": exact, "dup": g.grad, "dgate": e.grad})


def rope(dtype: torch.dtype) -> dict[str, float]:
    positions = torch.cat([torch.arange(length) for length in ROWS])
    angles = torch.outer(torch.arange(TOKENS), 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # (T, D)

    def exactly(*q_and_k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = [torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1) for x in q_and_k]
        return tuple(
            x * cos[positions].double() + half * sin[positions].double()
            for x, half in zip(q_and_k, halves, strict=True)
        )

    def ours(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rope_embedding.fast_rope_embedding(q, k, cos, sin, positions[None].int())

    q, k = (normal(1, TOKENS, n, HEAD_DIM, dtype=dtype).transpose(1, 2) for n in (HEADS, KV_HEADS))  # (B, H, T, D)
    return compare(ours, exactly, {"q": q, "k": k})


def cross_entropy(dtype: torch.dtype, vocabulary: int = 1000, tokens: int = TOKENS) -> dict[str, float]:
    labels = torch.randint(vocabulary, (tokens,))
    labels[::5] = -100

    def exactly(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.cross_entropy(logits, labels, reduction="none"),)

    def ours(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (cross_entropy_loss.Fast_CrossEntropyLoss.apply(logits, labels, 0, 0),)

    return compare(ours, exactly, {"logits": normal(tokens, vocabulary, dtype=dtype, scale=3)})


def cross_entropy_128k(dtype: torch.dtype) -> dict[str, float]:
    """Llama 3's vocabulary goes in two chunks, by another kernel."""
    return cross_entropy(dtype, 128_256, tokens=6)


def lora(dtype: torch.dtype, shapes: dict[str, tuple[int, int]], ours: Function, by_peft: Function) -> dict[str, float]:
    """Layers (in, out) with adapters: `ours(block, x)` beside PEFT's own forward of the same weights in float64."""
    block = torch.nn.Module()
    block.act_fn = torch.nn.SiLU()
    for name, (inner, outer) in shapes.items():
        block.add_module(name, torch.nn.Linear(inner, outer, bias=False))
    block = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=24, target_modules=list(shapes)), block)
    for name, weight in block.named_parameters():
        kept_in = torch.float32 if "lora_" in name else dtype
        weight.data = normal(*weight.shape, dtype=kept_in, scale=weight.shape[1] ** -0.5)
    x = normal(1, TOKENS, next(iter(shapes.values()))[0], dtype=dtype)
    sides = []
    for each, function, leaf in ((block, ours, x.clone()), (copy.deepcopy(block).double(), by_peft, x.double())):
        outputs = function(each, leaf.requires_grad_() * 1)
        leaves = {name: weight for name, weight in each.named_parameters() if weight.requires_grad}
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sides.append(with_gradients(outputs, {"x": leaf} | leaves, dtype))
    assert len(sides[0]) == len(sides[0].keys() & {"out0", "out1", "out2"}) + 1 + 2 * len(shapes)
    return errors(*sides)


def lora_qkv(dtype: torch.dtype) -> dict[str, float]:
    shapes = {"q_proj": (HIDDEN, HEADS * HEAD_DIM)}
    shapes |= dict.fromkeys(("k_proj", "v_proj"), (HIDDEN, KV_HEADS * HEAD_DIM))
    return lora(
        dtype, shapes, fast_lora.apply_lora_qkv, lambda block, x: tuple(block.get_submodule(n)(x) for n in shapes)
    )


def lora_o(dtype: torch.dtype) -> dict[str, float]:
    shapes = {"o_proj": (HEADS * HEAD_DIM, HIDDEN)}
    return lora(dtype, shapes, fast_lora.apply_lora_o, lambda block, x: block.o_proj(x))


def lora_mlp(dtype: torch.dtype) -> dict[str, float]:
    shapes = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}

    def by_peft(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x))

    return lora(dtype, shapes, fast_lora.apply_lora_mlp_swiglu, by_peft)


CASES = (rms_norm, swiglu, rope, cross_entropy, cross_entropy_128k, lora_qkv, lora_o, lora_mlp)

if __name__ == "__main__":
    report: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(0)
            report.setdefault(case.__name__, {})[str(dtype).removeprefix("torch.")] = case(dtype)
    print(json.dumps(report))
