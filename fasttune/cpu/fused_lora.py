"""LoRA on a CPU, where Unsloth's fused kernels do not run: one function a layer, in matmuls a BLAS is fast at.

Shapes: T tokens (all leading dimensions flattened), r the adapter's rank. Figures are in docs/LOG.md.
"""

from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fasttune.cpu import RANK_MULTIPLE


def enable(model: Any) -> int:
    """Give every plain fp32 LoRA layer the fused forward; how many layers there were. Others keep PEFT's."""
    from peft.tuners.lora.layer import Linear  # loaded by now, after unsloth, which patches it

    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def live_layers(model: Any) -> int:
    """How many layers of a model run the fused forward now."""
    return sum(getattr(getattr(module, "forward", None), "__func__", None) is _forward for module in model.modules())


class FusedLora(torch.autograd.Function):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ with its three gradients, the thin products added in place and written the fast way round.

    x (…, in), W (out, in), A (r, in), B (out, r) → (…, out), all float32; W is frozen. `bias` is None or (out,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.rank, ctx.scale = len(a), scale
        extra = -len(a) % RANK_MULTIPLE
        a, b = pad(a, (0, 0, 0, extra)), pad(b, (0, extra))
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        xa = rows @ a.t()  # (T, r)
        y = torch.nn.functional.linear(rows, weight, bias).addmm_(xa, b.t(), alpha=scale)
        ctx.save_for_backward(x, xa, weight, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, xa, weight, a, b = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dyb = dy @ b  # (T, r)
        dx = (dy @ weight).addmm_(dyb, a, alpha=ctx.scale).view(x.shape) if ctx.needs_input_grad[0] else None
        da = ctx.scale * (dyb.t() @ rows)[: ctx.rank]
        db = ctx.scale * (xa.t() @ dy).t()[:, : ctx.rank]  # dyᵀ @ xa is the same, and four times slower
        return dx, None, None, da, db, None


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's forward where it does more than train: no gradients, a merged or disabled adapter, mixed batches."""
    if args or kwargs or not torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)
    (name,) = layer.active_adapters
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    return FusedLora.apply(x, base.weight, base.bias, a, b, layer.scaling[name])


def _is_plain(layer: Any) -> bool:
    if len(layer.active_adapters) != 1 or layer.fan_in_fan_out:
        return False
    (name,) = layer.active_adapters
    parameters = [*layer.base_layer.parameters(), layer.lora_A[name].weight, layer.lora_B[name].weight]
    return (
        type(layer.base_layer) is torch.nn.Linear
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
        and not any(p.requires_grad for p in layer.base_layer.parameters())
    )
