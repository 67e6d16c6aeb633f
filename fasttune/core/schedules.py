"""The learning rate of each step, in the words of a Hugging Face trainer. Pure, no torch.

Of step t of T (the first is 0), with W warm-up steps, the highest value r and the lowest m (0 if none is set):

    t < W      r t / W; of wsd m + (r − m) t / W
    linear     m + (r − m) (T − t) / (T − W)
    cosine     m + (r − m) (1 + cos(π (t − W) / (T − W))) / 2
    constant   r
    wsd        r, in the last D steps m + (r − m) (1 − √((t − T + D) / D))

m would be reached at step T, behind the last one. Source: transformers/optimization.py (5.17); the form of wsd:
https://arxiv.org/abs/2405.18392, section 3. Parameters with a learning rate of their own follow the same curve.
"""

from typing import Any

from fasttune.errors import ConfigError
from fasttune.settings import TrainConfig

WSD_FORM = "1-sqrt"  # better than a straight line: https://arxiv.org/abs/2405.18392, section 3


def trainer_settings(train: TrainConfig, steps: int) -> dict[str, Any]:
    """Learning rate and schedule of a resolved config over so many steps, as a Hugging Face trainer takes them."""
    highest, lowest = train.learning_rate or 0.0, train.min_learning_rate or 0.0
    warmup, name, more = _warmup(train, steps), train.scheduler, dict[str, Any]()
    kind: str = name
    if name == "linear" and lowest and warmup < steps:  # else it never falls, and polynomial divides by 0
        kind, more = "polynomial", {"power": 1.0, "lr_end": lowest}
    elif name == "cosine" and lowest:
        kind, more = "cosine_with_min_lr", {"min_lr_rate": lowest / highest}
    elif name == "wsd":
        kind, more = "warmup_stable_decay", {"num_decay_steps": _decay(train, steps), "decay_type": WSD_FORM}
        more["min_lr_ratio"] = lowest / highest
    elif name == "constant" and warmup:
        kind = "constant_with_warmup"
    found = {"learning_rate": highest, "lr_scheduler_type": kind, "warmup_steps": warmup}
    return found | ({"lr_scheduler_kwargs": more} if more else {})


def check(train: TrainConfig, steps: int) -> None:
    """Raise ConfigError for a schedule that does not fit into so many steps."""
    warmup = _warmup(train, steps)
    longer = f"lower it, or raise train.max_steps (this run has {steps:,} steps)"
    if warmup > steps:
        raise ConfigError([f"train.warmup_steps: {warmup:,} steps of warm-up do not fit: {longer}"])
    if train.scheduler == "wsd" and warmup + _decay(train, steps) > steps:
        falls = f"train.decay_ratio={train.decay_ratio:g} is {_decay(train, steps):,} steps"
        raise ConfigError([f"train.warmup_steps: {warmup:,} and the decay do not fit ({falls}): {longer}"])


def in_words(train: TrainConfig, rate: float) -> str:
    """For a person, e.g. "0.0001, cosine to 1e-05, 100 warm-up steps"."""
    lowest = f" to {train.min_learning_rate:g}" if train.min_learning_rate else ""
    warmup = f", {train.warmup_steps:,} warm-up steps" if train.warmup_steps is not None else ""
    falls = f" in the last {train.decay_ratio:.0%} of the steps" if train.decay_ratio is not None else ""
    return f"{rate:g}, {train.scheduler}{lowest}{falls}{warmup}"


def _warmup(train: TrainConfig, steps: int) -> int:
    return round((train.warmup_ratio or 0) * steps) if train.warmup_steps is None else train.warmup_steps


def _decay(train: TrainConfig, steps: int) -> int:
    """Steps in which wsd falls, at least one; two shares that are 1 together may be rounded to one step too many."""
    decay = max(1, round((train.decay_ratio or 0) * steps))
    return decay if train.warmup_steps is not None else min(decay, max(1, steps - _warmup(train, steps)))
