"""Loss, token accuracy and right answers on held-out rows, beside a training that does not notice."""

import math
from dataclasses import asdict
from typing import Any

from fasttune.core import model as fasttune_model  # noqa: F401  first: it imports unsloth

import numpy as np
import torch

from fasttune.data.batching import Encoded, MicroBatch, best_fit, flat
from fasttune.data.tokenize import IGNORE
from fasttune.metrics import Evaluation, HeldOut
from fasttune.core import samples
from fasttune.core.prepare import Job

AT_ONCE = 256  # learned tokens whose logits are raised to float32 at a time
SOUND_TOKENS = 128  # of the end of a row
LARGEST_WEIGHT = 1e6  # those of models that work are below 1,000


class Validator:
    """Measures the model on the job's held-out rows when that is due, and remembers what it saw."""

    def __init__(self, job: Job, model: Any, autocast: bool):
        self.model, self.autocast, self._job = model, autocast, job
        self.every, self.total_steps = job.config.eval.every_steps, job.total_steps
        self.rows = len(job.held_out)
        self._batches = _in_packs(job) if job.data.packed else [_alone(flat([row])) for row in job.held_out]
        self.before: Evaluation | None = None
        self.last: Evaluation | None = None
        self.best: Evaluation | None = None

    def due(self, step: int) -> bool:
        """After which steps: 0 is before the first one."""
        on_the_way = self.every is not None and step % self.every == 0
        return self.rows > 0 and (step in (0, self.total_steps) or on_the_way)

    def missing(self, step: int) -> bool:
        """Whether it is due after `step` and was not done."""
        return self.due(step) and (self.last is None or self.last.step != step)

    def measure(self, step: int) -> Evaluation:
        """Evaluate now, as the model after `step`."""
        loss, right, count = self._sums_of(self._batches)
        self.last = Evaluation(step, float(loss / count), float(right / count), self._answered(step))
        self.before = self.last if step == 0 else self.before
        if step and math.isfinite(self.last.loss) and (self.best is None or self.last.loss < self.best.loss):
            self.best = self.last
        return self.last

    def sound(self, row: Encoded) -> bool:
        """Whether the weights as they are now are those of a model: no diverged ones, and a loss on this row."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not float(torch.nn.utils.get_total_norm(trained, math.inf)) < LARGEST_WEIGHT:
            return False
        ids = row[0][-SOUND_TOKENS:]
        batch = flat([(ids, np.ones(len(ids), np.bool_))])
        return bool(self._sums_of([batch if self._job.data.packed else _alone(batch)])[0].isfinite())

    def _sums_of(self, batches: list[MicroBatch]) -> torch.Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            return torch.tensor([self._sums(batch) for batch in batches], dtype=torch.float64).sum(0)
        finally:
            self.model.train(was_training)

    def _answered(self, step: int) -> float | None:
        if step in (0, self.total_steps):
            return None  # all of them are answered there, for the samples
        job = self._job
        problems = job.problems[: job.config.eval.problems]
        return samples.exact_match(self.model, job.tokenizer, problems, job.plan.gradient_checkpointing)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, which `restore` takes."""
        return {name: seen and asdict(seen) for name, seen in self._seen().items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self._seen():
            setattr(self, name, Evaluation(**state[name]) if state.get(name) else None)

    def _seen(self) -> dict[str, Evaluation | None]:
        return {"before": self.before, "last": self.last, "best": self.best}

    def result(self, saved_step: int | None) -> HeldOut | None:
        """For run.json; None if nothing was measured."""
        if self.last is None:
            return None
        loss_tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in self._batches)
        return HeldOut(self.rows, loss_tokens, self.before, self.last, self.best, saved_step)

    @torch.no_grad()
    def _sums(self, batch: MicroBatch) -> tuple[float, float, int]:
        """Summed loss, tokens guessed right, and tokens, of the learned ones of (1, T)."""
        given = {name: torch.from_numpy(array).to(self.model.device) for name, array in batch.items()}
        labels = given.pop("labels")[0, 1:]  # position t predicts token t + 1
        positions = (labels != IGNORE).nonzero()[:, 0]
        on_gpu = torch.cuda.is_available()  # Unsloth's forward takes no positions there: all T logits
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            kept = {} if on_gpu else {"logits_to_keep": positions}
            logits = self.model(**given, **kept, use_cache=False).logits[0]
        logits = logits[positions] if on_gpu else logits  # (N, V)
        loss = right = 0.0
        for guess, label in zip(logits.split(AT_ONCE), labels[positions].split(AT_ONCE), strict=True):
            loss += float(torch.nn.functional.cross_entropy(guess.float(), label, reduction="sum"))
            right += float((guess.argmax(-1) == label).sum())
        return loss, right, len(positions)


def _in_packs(job: Job) -> list[MicroBatch]:
    """Packs of one full row at most: a GPU computes the logits of every token of them."""
    groups = best_fit([len(ids) for ids, _ in job.held_out], job.config.model.max_length)
    return [flat([job.held_out[i] for i in group], job.data.share_prefix) for group in groups]


def _alone(batch: MicroBatch) -> MicroBatch:
    return {name: array for name, array in batch.items() if name != "packed_seq_lengths"}
