"""Between a run and its checkpoints: what it may go on from, and when the next one is due."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttune.core import checkpoint as checkpoints
from fasttune.core import model as models, state  # model first: it imports unsloth

import transformers

from fasttune.core.checkpoint import Checkpoint
from fasttune.errors import OutputError, RunFailed, kind_and_line
from fasttune.core.prepare import Job
from fasttune.core.state import restore_optimizer, restore_random
from fasttune.core.summary import Outcome
from fasttune.core.evaluation import Validator


def find(run: Path, model: Any, identity: dict[str, str], note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of `run` that holds, or None where there is none at all; says which, and why not others.

    Raises OutputError if none holds, or if it belongs to another model, rows or settings. Under the run's lock.
    """
    found, passed_over = checkpoints.newest(run, lambda found: state.misfit(found, model, identity))
    for reason in passed_over:
        note(f"passed over {reason}")
    if found is None and passed_over:
        raise OutputError(
            f"--resume: no checkpoint of {run} holds ({'; '.join(passed_over)}); begin anew with overwrite=true"
        )
    if found is None:
        note(f"{run} has no checkpoint yet: beginning with step 1")
        return None
    if changed := state.differences(found.state["identity"], identity):
        raise OutputError(
            f"--resume: {found.path} belongs to another run: {'; '.join(changed)}. "
            "Set that back, or begin anew in another output_dir"
        )
    note(f"going on from {found.path}, step {found.state['step']:,}")
    return found


class Resumed(transformers.TrainerCallback):
    """Puts a new trainer where a checkpoint left off: optimizer and counters at once, random states at its step."""

    def __init__(self, trainer: Any, checkpoint: Checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint
        self.done = checkpoint.state["step"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restored(lambda: restore_optimizer(self.trainer, self.checkpoint))
        models.begin_after(self.trainer, state, self.done)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.done:  # not before: beginning to load data draws random numbers too
            self._restored(lambda: restore_random(self.checkpoint))

    def _restored(self, restore: Callable[[], None]) -> None:
        try:
            restore()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, AssertionError) as error:
            raise RunFailed(
                f"{self.checkpoint.path} cannot be gone on from ({kind_and_line(error)}); "
                "remove it, and go on from the one before it with --resume"
            ) from error


class Keeper:
    """Writes a checkpoint when one is due. A disk that cannot take it is a warning: the run goes on and tries again."""

    def __init__(
        self,
        job: Job,
        trainer: Any,
        validator: Validator,
        identity: dict[str, str],
        started: float,
        outcome: Outcome,
        warn: Callable[[str], None],
    ):
        self.job, self.trainer, self.validator, self.identity = job, trainer, validator, identity
        self.started = started  # perf_counter() when the run, resumed ones included, would have begun
        self.outcome = outcome
        self.warn = warn
        self._last_s = time.perf_counter()

    def after_step(self, step: int, stopping: bool) -> None:
        """Called between two steps; `stopping`: this one is the last before the process ends."""
        if stopping or self._due(step):
            self.write(step)

    def write(self, step: int) -> None:
        if not self.sound():
            self.warn(f"step {step}: no checkpoint, for its weights have diverged; {self.outcome.kept}")
            return
        tensors, values = state.collect(self.trainer)
        values |= {"identity": self.identity, "wall_s": time.perf_counter() - self.started}
        values["held_out"] = self.validator.state()
        self._last_s = time.perf_counter()
        try:
            self.outcome.checkpoint = checkpoints.save(self.job.folder, step, tensors, values)
        except OSError as error:
            self.warn(f"step {step}: no checkpoint could be written ({error.strerror or error}); {self.outcome.kept}")
            return
        if step < self.job.total_steps:  # that of the last step is there only until the run is completed
            best = self.validator.best
            checkpoints.prune(self.job.folder, self.job.config.checkpoint.keep, best.step if best else None)

    def sound(self) -> bool:
        """Whether the weights as they are now have not diverged: tried on a row of the last step that had a loss."""
        good = next((step.step for step in reversed(self.outcome.steps) if math.isfinite(step.loss)), 1)
        part, row = self.job.data.rows_of(good - 1)[0]
        return self.validator.sound(self.job.data.parts[part].row(row))

    def bring_back_best(self, step: int) -> int:
        """After the last step: with eval.keep_best the weights of the best one. Returns the step they are of."""
        best = self.validator.best
        if not self.job.config.eval.keep_best or best is None or best.step == step:
            return step
        path = self.job.folder / checkpoints.FOLDER / f"step-{best.step}"
        try:
            found = checkpoints.read(path)
            if problem := state.misfit(found, self.trainer.model):
                raise checkpoints.Broken(problem)
        except checkpoints.Broken as error:
            self.warn(f"eval.keep_best: {path.name} does not hold ({error}): the weights of the last step are saved")
            return step
        state.restore_weights(self.trainer.model, found)
        return best.step

    def _due(self, step: int) -> bool:
        every = self.job.config.checkpoint
        if step == self.job.total_steps:
            return True  # what comes after it may be ended too, and is then finished by --resume
        best = self.validator.best
        if best and best.step == step and (self.job.config.eval.keep_best or every.every != "never"):
            return True
        if every.every_steps is not None:
            return step % every.every_steps == 0
        return every.every_s is not None and time.perf_counter() - self._last_s >= every.every_s
