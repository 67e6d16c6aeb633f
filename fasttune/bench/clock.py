"""The stopwatch and the counters of every arm: the same code for all, on the tensors that are trained on."""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from fasttune.bench.result import Repeat
from fasttune.core import what_ran
from fasttune.metrics import Backend


class Clock(transformers.TrainerCallback):
    """Seconds and loss of each step. A step lasts from the end of the one before, so fetching its rows is in it."""

    def __init__(self, process_started: float):
        self.process_started = process_started
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.seconds_to_first_step = 0.0
        self.weights_digest = ""
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        began = time.perf_counter()
        self.weights_digest = what_ran.weights_digest(model)
        self.process_started += time.perf_counter() - began  # not what a person waits for
        what_ran.synchronize()
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        what_ran.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.seconds_to_first_step = self.seconds_to_first_step or now - self.process_started
        self._last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Counter:
    """Wraps a collator: counts what it gives and hashes the rows in it. `per_step` batches make an optimizer step."""

    def __init__(self, collate: Callable[[Any], Any], per_step: int):
        self.collate = collate
        self.batches = getattr(collate, "batches", None)  # where the trainer halves micro-batches out of memory
        self.per_step = per_step
        self.counts: list[dict[str, int]] = []
        self.rows: list[list[bytes]] = []
        self.flat = False

    def __call__(self, examples: Any) -> Any:
        made = self.collate(examples)
        batches = made if isinstance(made, list) else [made]
        self.flat = all("attention_mask" not in batch for batch in batches)
        self.counts.append(what_ran.count_tokens(batches))
        self.rows.append([row for batch in batches for row in rows_in(batch)])
        return made

    torch_call = __call__  # Unsloth looks for TRL's name

    @property
    def layout(self) -> str:
        """How the rows lay, from the batches that were given out."""
        return "end to end" if self.flat else "padded"

    def per_steps(self, name: str, steps: int) -> list[int]:
        """One of the counts of each of the first `steps` steps (a loader may have fetched further)."""
        at = range(0, steps * self.per_step, self.per_step)
        return [sum(count[name] for count in self.counts[i : i + self.per_step]) for i in at]

    def digest(self, steps: int) -> str:
        """Hash of the rows of each step, whatever their order and layout in it."""
        total = hashlib.sha256()
        for i in range(0, steps * self.per_step, self.per_step):
            for row in sorted(row for rows in self.rows[i : i + self.per_step] for row in rows):
                total.update(len(row).to_bytes(8) + row)
            total.update(b"step")
        return total.hexdigest()


def rows_in(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """Token ids and labels of every row of a micro-batch, without padding. A row's first label is never learned."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:  # a rectangle
        mask = batch.get("attention_mask")
        keep = torch.ones_like(ids).bool() if mask is None else mask.bool()
        pairs = [(row[k], label[k]) for row, label, k in zip(ids, labels, keep, strict=True)]
    else:  # flat: positions restart with each row, behind a prefix that all may share
        prefix = int(batch.get("shared_prefix", 0))
        starts = (batch["position_ids"][0] == prefix).nonzero().flatten().tolist()
        ends = [*starts[1:], ids.shape[1]]
        pairs = [
            (torch.cat([ids[0, :prefix], ids[0, a:b]]), torch.cat([labels[0, :prefix], labels[0, a:b]]))
            for a, b in zip(starts, ends, strict=True)
        ]
    return [row.to(torch.int64).numpy().tobytes() + label[1:].to(torch.int64).numpy().tobytes() for row, label in pairs]


def repeat(clock: Clock, counter: Counter, model: Any, rows_per_step: int, backend: Backend) -> Repeat:
    """What was measured, as the result type."""
    steps = len(clock.seconds)
    tokens, learned = counter.per_steps("tokens", steps), counter.per_steps("loss_tokens", steps)
    computed = sum(tokens) - sum(counter.per_steps("shared_tokens", steps))
    flops = what_ran.count_flops(model)
    return Repeat(
        tokens=tokens,
        loss_tokens=learned,
        padding_tokens=counter.per_steps("padding_tokens", steps),
        seconds=clock.seconds,
        losses=clock.losses,
        rows_digest=counter.digest(steps),
        peak_memory_gib=what_ran.peak_memory_gib(),
        seconds_to_first_step=clock.seconds_to_first_step,
        flops_per_token=flops.of_step(computed, sum(learned), rows_per_step * steps) / sum(tokens) if flops else None,
        backend=backend,
        weights_digest=clock.weights_digest,
    )
