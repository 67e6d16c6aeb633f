"""Between a run and its checkpoints: what it may go on from, and when the next one is due."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttune import checkpoint as checkpoints, paths
from fasttune.training import state  # imports unsloth, which must come before transformers

import transformers

from fasttune.checkpoint import Checkpoint
from fasttune.errors import OutputError
from fasttune.training.prepare import Job
from fasttune.training.state import restore_optimizer, restore_random
from fasttune.training.validation import Validator


def find(run: Path, identity: dict[str, str], note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint of `run` that holds, or None where there is none at all; says which, and why not others.

    Raises OutputError if the run is completed, if none holds, or if it belongs to another model, rows or settings.
    """
    if _is_completed(run):
        raise OutputError(f"--resume: {run} is completed, nothing is left to do; begin anew in another output_dir")
    found, passed_over = checkpoints.newest(run)
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


def _is_completed(run: Path) -> bool:
    try:
        return json.loads(paths.read_text(run / "run.json"))["status"] == "completed"
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Resumed(transformers.TrainerCallback):
    """Puts a new trainer where a checkpoint left off: optimizer and counters at once, random states at its step."""

    def __init__(self, trainer: Any, checkpoint: Checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint
        self.done = checkpoint.state["step"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        restore_optimizer(self.trainer, self.checkpoint)
        state.global_step = self.trainer._globalstep_last_logged = self.done

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.done:  # not before: beginning to load data draws random numbers too
            restore_random(self.checkpoint)


class Keeper:
    """Writes a checkpoint when one is due. A disk that cannot take it is a warning: the run goes on and tries again."""

    def __init__(
        self,
        job: Job,
        trainer: Any,
        validator: Validator,
        identity: dict[str, str],
        started: float,
        warn: Callable[[str], None],
    ):
        self.job, self.trainer, self.validator, self.identity = job, trainer, validator, identity
        self.started = started  # perf_counter() when the run, resumed ones included, would have begun
        self.warn = warn
        self.last: Path | None = None  # the last good one
        self._last_s = time.perf_counter()

    def after_step(self, step: int, stopping: bool) -> None:
        """Called between two steps; `stopping`: this one is the last before the process ends."""
        if stopping or self._due(step):
            self.write(step)

    def write(self, step: int) -> None:
        tensors, values = state.collect(self.trainer)
        values |= {"identity": self.identity, "wall_s": time.perf_counter() - self.started}
        values["held_out"] = self.validator.state()
        self._last_s = time.perf_counter()
        try:
            self.last = checkpoints.save(self.job.folder, step, tensors, values)
        except OSError as error:
            kept = f"{self.last.name} is the last good one" if self.last else "there is none yet"
            self.warn(f"step {step}: no checkpoint could be written ({error.strerror or error}); {kept}")
        else:
            best = self.validator.best
            checkpoints.prune(self.job.folder, self.job.config.checkpoint.keep, best.step if best else None)

    def bring_back_best(self, step: int) -> int:
        """After the last step: with eval.keep_best the weights of the best one. Returns the step they are of."""
        best = self.validator.best
        if not self.job.config.eval.keep_best or best is None or best.step == step:
            return step
        path = self.job.folder / checkpoints.FOLDER / f"step-{best.step}"
        if problem := checkpoints.broken(path):
            self.warn(f"eval.keep_best: {path.name} does not hold ({problem}): the weights of the last step are saved")
            return step
        state.restore_weights(self.trainer.model, checkpoints.read(path))
        return best.step

    def _due(self, step: int) -> bool:
        every = self.job.config.checkpoint
        if step == self.job.total_steps:
            return False  # what was learned is saved right after
        best = self.validator.best
        if best and best.step == step and (self.job.config.eval.keep_best or every.every != "never"):
            return True
        if every.every_steps is not None:
            return step % every.every_steps == 0
        return every.every_s is not None and time.perf_counter() - self._last_s >= every.every_s
