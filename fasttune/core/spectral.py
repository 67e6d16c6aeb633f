"""The two factors of every LoRA adapter balanced again, without a change of what they compute (lora.refactor_every).

B·A stays; of the many pairs with that product the one is taken whose factors have the same singular values, so that
neither's gradient is scaled by a large other factor. Adam's moments move with them, as those of the gradients.
Shapes: A (r, in), B (out, r); n layers of the same shape are computed at once.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fasttune.core.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from fasttune.core.run_folder import Journal
    from fasttune.core.trainer import MeasuredTrainer

MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch's AdamW
VANISHING = 1e-6  # of the largest singular value of B·A: below, the smallest one is rounding (B = 0 at the start)


@dataclass(frozen=True)
class Seen:
    """A layer, before and after. condition: largest over smallest singular value; balance: ‖BᵀB − AAᵀ‖ over ‖BA‖."""

    layer: str
    skipped: bool
    condition_a: float
    condition_b: float
    condition: float  # of both, after
    balance: float
    balance_after: float


@dataclass(frozen=True)
class Pair:
    layer: str
    a: torch.nn.Parameter
    b: torch.nn.Parameter


def pairs(model: Any) -> list[Pair]:
    """The factors of every adapter of a PEFT model."""
    found = []
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            found.append(Pair(name, module.lora_A["default"].weight, module.lora_B["default"].weight))
    return found


def after_step(trainer: "MeasuredTrainer", journal: "Journal") -> tuple[float | None, float | None]:
    """Balance all adapters, write down what was seen of each layer, and return the largest condition and balance.

    Before the checkpoint of the step, and part of its seconds.
    """
    layers = refactor(trainer.model, trainer.optimizer, trainer.ranks)
    journal.refactored(trainer.state.global_step, layers)
    changed = [each for each in layers if not each["skipped"]]
    worst = max((max(each["condition_a"], each["condition_b"]) for each in changed), default=None)
    return worst, max((each["balance"] for each in changed), default=None)


@torch.no_grad()
def refactor(model: Any, optimizer: Any, ranks: Ranks = ALONE) -> list[dict[str, Any]]:
    """Balance all adapters between two steps, moments of torch's AdamW included; what was seen of each layer.

    No random numbers are used. A layer whose B·A has rank below r stays as it is. Every rank gets what rank 0 computed:
    two cards may round differently.
    """
    state = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps it
    by_shape: dict[tuple[torch.Size, torch.Size], list[Pair]] = {}
    found = pairs(model)
    for pair in found:
        by_shape.setdefault((pair.a.shape, pair.b.shape), []).append(pair)
    seen = [each for group in by_shape.values() for each in _of_one_shape(group, state)]
    factors = [factor for pair in found for factor in (pair.a, pair.b)]
    moments = [state[factor][name] for factor in factors for name in MOMENTS if name in state.get(factor, {})]
    ranks.copy_from_first([*factors, *moments])
    return [asdict(each) for each in seen]


def _of_one_shape(group: list[Pair], state: Any) -> Iterator[Seen]:
    a, b = (torch.stack([getattr(pair, name).detach().float() for pair in group]) for name in ("a", "b"))
    new_a, new_b, change, back, values = balanced(a, b)
    skipped = values[:, -1] <= VANISHING * values[:, 0]
    before, after = balance(a, b), balance(new_a, new_b)
    for at, pair in enumerate(group):
        if not skipped[at]:
            pair.a.copy_(new_a[at])
            pair.b.copy_(new_b[at])
            _move(state.get(pair.a, {}), change[at].T, left=True)
            _move(state.get(pair.b, {}), back[at].T, left=False)
        size = values[at].norm().clamp_min(torch.finfo(torch.float32).tiny)
        yield Seen(
            layer=pair.layer,
            skipped=bool(skipped[at]),
            condition_a=float(torch.linalg.cond(a[at])),
            condition_b=float(torch.linalg.cond(b[at])),
            condition=float((values[at, 0] / values[at, -1]).sqrt()),
            balance=float(before[at] / size),
            balance_after=float((before if skipped[at] else after)[at] / size),
        )


def balanced(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A', B', T, T⁻¹, S) of A (n, r, in) and B (n, out, r), with A = T A', B' = B T and B A = U S Vᵀ; S (n, r).

    B' = Q U √S and A' = √S Vᵀ Pᵀ from thin factors B = Q R and Aᵀ = P L, and the core R Lᵀ = U S Vᵀ (r, r). A column of
    B' has its largest entry positive, so that the same B·A gives the same factors.
    """
    q, r = torch.linalg.qr(b)
    p, lower = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(r @ lower.mT)
    left = q @ u
    largest = left.abs().argmax(-2, keepdim=True)
    sign = torch.where(left.gather(-2, largest) < 0, -1.0, 1.0)  # (n, 1, r)
    root = s.sqrt()[:, None, :]  # of a vanishing layer inverse and product are not used
    left, u, vt = left * sign, u * sign, vt * sign.mT
    change = lower.mT @ vt.mT / root
    back = root.mT.reciprocal() * (u.mT @ r)
    return root.mT * vt @ p.mT, left * root, change, back, s


def balance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖BᵀB − AAᵀ‖ of each layer: 0 where both have the same singular values and directions."""
    return torch.linalg.matrix_norm(b.mT @ b - a @ a.mT)


def _move(moments: dict[str, torch.Tensor], by: torch.Tensor, left: bool) -> None:
    """Those of a gradient G that becomes `by` G (or G `by`). The second ones as if the entries were independent."""
    for name, factor in zip(MOMENTS, (by, by.square()), strict=True):
        if name in moments:
            value = moments[name].float().clone()  # what is read from a file is not aligned: a BLAS rounds otherwise
            moments[name].copy_(factor @ value if left else value @ factor)
