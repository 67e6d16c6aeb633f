"""fasttune in a notebook or a program of yours, `from fasttune import train, load_config`: docs/python.md.

result = train(load_config("config.yaml", "train.max_steps=20"))
"""

import os
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fasttune import config as configs
from fasttune.config import Config
from fasttune.errors import FasttuneError, RunFailed, short

if TYPE_CHECKING:
    from fasttune.metrics import RunResult

PATCHED = ("transformers", "trl", "peft")  # by Unsloth while it is imported, which must come before them


def load_config(path: str | os.PathLike[str], *overrides: str) -> Config:
    """A YAML file, with `section.key=value` in place of what it says. Raises ConfigError, with all problems, and
    TypeError for what is no text.
    """
    for override in overrides:
        if not isinstance(override, str):
            raise TypeError(f'load_config: settings are texts like "train.max_steps=20", not {short(override)}')
    return configs.load(os.fspath(path), overrides)


def train(config: Config, resume: bool | str | os.PathLike[str] | None = None, quiet: bool = False) -> "RunResult":
    """`fasttune train` on one GPU or the CPU: trains, writes the run's folder, and returns what run.json holds.

    resume: resume a run: that of this folder, or with True the one that `--resume` alone takes.
    quiet: show warnings only.

    Ctrl-C, or the kernel's interrupt, finishes the step and saves: the result's `status` is `interrupted`.
    Raises ConfigError, DataError, ModelError and OutputError for what can be fixed before a step is made, with nothing
    written; RunFailed for a run that began and failed, what it left is in its folder. All are FasttuneErrors. Raises
    TypeError for what is no Config.
    """
    if not isinstance(config, Config):
        raise TypeError(f"train: give it load_config(…), not {short(config)}")
    if threading.current_thread() is not threading.main_thread():
        raise FasttuneError("train: call it from the main thread: Ctrl-C and SIGTERM are handled there")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.device_count() > 1:
        fix = "restart the kernel and train first, or set CUDA_VISIBLE_DEVICES to one of them before torch is imported"
        raise FasttuneError(
            f"train: this process uses {torch.cuda.device_count()} GPUs already, a run takes one: {fix}"
        )
    if "unsloth" not in sys.modules and (early := [name for name in PATCHED if name in sys.modules]):
        warnings.warn(
            f"{', '.join(early)} imported before fasttune.train was called: Unsloth patches them while it is imported, "
            "and may now train slower or differently; restart the kernel and call train first",
            stacklevel=2,
        )
    from fasttune import gpus, hardware, terminal
    from fasttune.core import train as training
    from fasttune.tools import card, estimate

    folder = None
    if resume is not None and resume is not False:
        from fasttune.core import resume as resuming

        folder = resuming.to_resume(config, "" if resume is True else os.fspath(resume))
    if hardware.has_nvidia_smi():
        gpus.pin()
    reporter = terminal.Reporter(quiet=quiet)
    result = training.run(config, reporter, folder, when_ready=estimate.add_to, when_saved=card.of_run)
    reporter.finish(result)
    if result.status == "failed":
        raise RunFailed(f"{Path(result.output_dir)}: {result.error}")
    return result
