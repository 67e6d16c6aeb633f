"""What a run writes down while it trains: config.yaml, and metrics.jsonl step by step."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydantic

from fasttune import config as configuration, report, system
from fasttune.config import Config
from fasttune.core import run_folder, summary
from fasttune.core.prepare import Job
from fasttune.core.summary import Outcome
from fasttune.core.trackers import Tracker
from fasttune.errors import OutputError, RunFailed
from fasttune.metrics import StepMetrics
from fasttune.system import LibraryLog
from fasttune.terminal import Reporter

CONFIG, METRICS = "config.yaml", "metrics.jsonl"


def begin(job: Job, log: LibraryLog, resumed: bool) -> None:
    """Write the resolved config into the folder of a run, which is held. Raises OutputError."""
    try:
        _write_config(job)
        run_folder.sweep(job.folder)
        log.move_to(job.folder / "library.log", append=resumed)
    except OSError as error:
        raise OutputError(
            f"output_dir: {job.folder} cannot be written ({error.strerror}); free some room, or name another folder"
        ) from error


def read_metrics(folder: Path, step: int, warn: Callable[[str], object]) -> list[StepMetrics]:
    """The steps of a run up to `step`, from its metrics.jsonl; a warning for those whose line cannot be read."""
    path, found = folder / METRICS, dict[int, StepMetrics]()
    form = pydantic.TypeAdapter(StepMetrics)
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # a machine that went down may have torn it
            values = json.loads(line)
            one = form.validate_python(values | {"loss": math.nan if values["loss"] is None else values["loss"]})
            found[one.step] = one
    kept = [found[number] for number in sorted(found) if 0 < number <= step]
    if lost := step - len(kept):
        warn(
            f"{METRICS}: the lines of {lost:,} of the {step:,} steps before the checkpoint cannot be read: the weights "
            "are right, but tokens, losses and speeds of the report are without these steps"
        )
    return kept


class Journal:
    """Told of every step that is done: writes its line, shows it, and warns of what it must."""

    def __init__(self, job: Job, trainer: Any, reporter: Reporter, outcome: Outcome):
        self.job, self.trainer, self.reporter, self.outcome = job, trainer, reporter, outcome
        self._rows_at_once: int | None = None
        self._first = True
        self._path = job.folder / METRICS
        self._disk_is_full = False
        self.tracker = Tracker(job, outcome.resumed_from_step, self.warn)

    def __enter__(self) -> "Journal":
        for text in self.job.warnings:
            self.reporter.warn(text)
        self._write_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.reporter.stop()
        with suppress(OSError):
            if self._disk_is_full or not self._path.exists():
                self._write_all()

    def warn(self, text: str) -> None:
        self.outcome.warnings.append(text)
        self.reporter.warn(text)

    def step(self, step: StepMetrics, bad_in_a_row: int) -> None:
        """`bad_in_a_row`: this step, and those right before it, were not applied. Raises RunFailed for too many."""
        self.outcome.steps.append(step)
        self._write(step)
        self.tracker.step(step)
        self._what_runs(step)
        self.reporter.step(step)
        if not bad_in_a_row:
            return
        bad = "a gradient that is not finite" if math.isfinite(step.loss) else f"a loss of {step.loss}"
        rows = self.job.data.describe(step.step - 1)
        self.warn(f"step {step.step} was not applied: {bad}; it had {rows}")
        if bad_in_a_row > self.job.config.train.max_bad_steps:
            raise RunFailed(
                f"{bad_in_a_row} steps in a row could not be applied, the last with {bad} on {rows}; "
                f"look at these rows, or lower train.learning_rate; {self.outcome.kept}"
            )

    def _write(self, step: StepMetrics) -> None:
        """Its line. On a full disk the run goes on, and the file is made anew as soon as there is room."""
        try:
            if self._disk_is_full or not self._path.exists():
                self._write_all()
            else:
                with system.open_text(self._path, "a") as file:
                    file.write(_line(step))
            self._disk_is_full = False
        except OSError as error:
            if not self._disk_is_full:
                self.warn(
                    f"step {step.step}: {METRICS} could not be written ({error.strerror}); written later, if it can"
                )
            self._disk_is_full = True

    def _write_all(self) -> None:
        """A file with all steps so far, the old one until it is whole; its folder again, where somebody removed it."""
        folder = self.job.folder
        if not (folder / CONFIG).exists():
            folder.mkdir(parents=True, exist_ok=True)  # a checkpoint may have made it already
            _write_config(self.job)
            self.warn(f"{folder} was removed while the run wrote into it: made again")
        system.write_atomic(self._path, "".join(map(_line, self.outcome.steps)).encode())

    def _what_runs(self, step: StepMetrics) -> None:
        """Warns where that is not what was asked for, or not any more."""
        from fasttune.core.trainer import backend

        if self._first:
            for text in summary.broken_promises(self.job, self.trainer, backend(self.trainer)):
                self.warn(text)
        self._first = False
        if self.trainer.rows_at_once != self._rows_at_once:
            self._rows_at_once = self.trainer.rows_at_once
            self.warn(
                f"out of memory at step {step.step}: from here on {self._rows_at_once} full rows at once; the batch "
                f"stays {self.job.config.train.batch_rows} rows, so nothing that is learned changes"
            )


def _line(step: StepMetrics) -> str:
    return report.to_json_line(step) + "\n"


def _write_config(job: Job) -> None:
    header = f"{run_folder.MARK}; run it again with: fasttune train config.yaml\n"
    text = configuration.dump(_portable(job.config), header)
    system.write_atomic(job.folder / CONFIG, text.encode())


def _portable(config: Config) -> Config:
    """As config.yaml keeps it: local paths absolute, and no output folder, so that it can be run again as it is."""

    def absolute(name: str | None) -> str | None:
        path = Path(name).expanduser() if name and not name.startswith("builtin:") else None
        return str(path.resolve()) if path and path.exists() else name

    train = config.data.train
    named = absolute(train) if isinstance(train, str) else {absolute(name): weight for name, weight in train.items()}
    data = config.data.model_copy(update={"train": named, "eval": absolute(config.data.eval)})
    model = config.model.model_copy(update={"name": absolute(config.model.name)})
    return config.model_copy(update={"data": data, "model": model, "output_dir": None, "overwrite": False})
