"""The steps of a run in TensorBoard, Weights & Biases or Trackio, only where `train.report_to` asks for one.

TensorBoard writes files into the run's folder and sends nothing. The others send where their own settings say; they get
the resolved config and the numbers of metrics.jsonl, no code, no console output and no facts of the machine.
transformers' own reporting callbacks are not used: they send all training arguments, paths and the model's config too.
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from fasttune.errors import ConfigError, kind_and_line
from fasttune.metrics import StepMetrics

if TYPE_CHECKING:
    from fasttune.core.prepare import Job

SHOWN = ["loss", "learning_rate", "grad_norm", "tokens_per_s", "computed_tokens", "peak_memory_gib"]
SHOWN += ["eval_loss", "eval_token_accuracy", "eval_exact_match"]
OFFLINE = ("offline", "disabled", "dryrun")  # of WANDB_MODE

Send = Callable[[dict[str, float], int], None]  # numbers by name, step


def check_installed(names: list[str]) -> None:
    """Fail early, before anything is imported: raises ConfigError for every package or key that is missing."""
    problems = [
        f"train.report_to={name}: the package is not installed; pip install {name}, or leave it out"
        for name in names
        if importlib.util.find_spec(name) is None
    ]
    if not problems and "wandb" in names and os.environ.get("WANDB_MODE") not in OFFLINE and not _wandb_key():
        problems.append("train.report_to=wandb: no key; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")
    if problems:
        raise ConfigError(problems)


class Tracker:
    """Where the steps go. What it cannot send is one warning; the run continues, and the other trackers with it.

    name: tensorboard, wandb or trackio.
    """

    def __init__(self, name: str, job: "Job", resumed_from_step: int | None, warn: Callable[[str], None]):
        self.name, self.warn = name, warn
        self._send: Send | None = None
        self._close: Callable[[], None] = lambda: None
        self._guarded(lambda: self._open(job, resumed_from_step))

    def step(self, step: StepMetrics) -> None:
        found = {name: getattr(step, name) for name in SHOWN}
        numbers = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        if (send := self._send) is not None:
            self._guarded(lambda: send(numbers, step.step))

    def close(self) -> None:
        self._guarded(self._close)

    def _open(self, job: "Job", resumed_from_step: int | None) -> None:
        make = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}[self.name]
        self._send, self._close = make(job, resumed_from_step)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # theirs
                action()
        except Exception as error:  # a service that is down must not cost the run
            self._send, self._close = None, lambda: None
            self.warn(f"train.report_to: nothing more is sent to {self.name}: {kind_and_line(error)}")


def _tensorboard(job: "Job", resumed_from_step: int | None) -> tuple[Send, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    purge = None if resumed_from_step is None else resumed_from_step + 1  # what the lost steps have left
    writer = SummaryWriter(str(job.folder / "tensorboard"), purge_step=purge)

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(job: "Job", resumed_from_step: int | None) -> tuple[Send, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project="fasttune",
        name=job.folder.name,
        dir=str(job.folder),
        config=job.config.model_dump(mode="json"),
        settings=wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        ),
    )
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _trackio(job: "Job", resumed_from_step: int | None) -> tuple[Send, Callable[[], None]]:
    import trackio

    trackio.init(project="fasttune", name=job.folder.name, config=job.config.model_dump(mode="json"))
    return lambda numbers, step: trackio.log(numbers, step=step), trackio.finish


def _wandb_key() -> bool:
    """Where wandb itself looks: https://docs.wandb.ai/guides/track/environment-variables"""
    import requests

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(server))
