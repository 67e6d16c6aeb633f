"""Checkpoints: what is in one, when the next one is due, and its files: whole or not there, checked, never pickled.

RUN/checkpoints/step-N/   weights, optimizer, random .safetensors · state.json: plain values, and what it belongs to
                          manifest.json: size and SHA-256 of each of them, written last
RUN/checkpoints/start.safetensors   the adapter that a run with lora.init=pissa or olora began with

The position in the data is the step alone. resume.py reads them, restore.py puts a run back where one left off.
"""

import hashlib
import json
import math
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttune import system
from fasttune.settings import RESIDUAL

if TYPE_CHECKING:
    from fasttune.config import Config
    from fasttune.core.evaluation import Validator
    from fasttune.core.prepare import Job
    from fasttune.core.run_folder import Journal
    from fasttune.core.trainer import MeasuredTrainer

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
START = "start.safetensors"
# What may differ between a checkpoint and the run that resumes from it: how a step is computed, not its result.
# The length of the run and the model are compared as what they came to: steps, and a checksum of the weights.
FREE = {
    "model.name",
    "model.revision",
    "train.epochs",
    "train.gradient_checkpointing",
    "train.max_bad_steps",
    "train.max_steps",
    "train.micro_batch_rows",
    "train.packing",
    "train.report_to",
}
# Settings that checkpoints of older versions do not name, as they were then.
ADDED = {
    "data.deduplicate": "False",
    "data.chat_template": "None",
    "lora.plus_ratio": "None",
    "lora.refactor_every": "None",
    "lora.train_embeddings": "False",
    "model.added_tokens": "[]",
    "train.betas": "[0.9, 0.999]",
    "train.decay_ratio": "None",
    "train.early_stopping_patience": "None",
    "train.embedding_learning_rate": "None",
    "train.group_by_prompt": "False",
    "train.min_learning_rate": "None",
    "train.warmup_steps": "None",
}
SECTIONS = ("seed", "model", "lora", "train")
WHOLE = "steps of the whole run"

Tensors = dict[str, Any]  # name → torch.Tensor


class Keeper:
    """Writes a checkpoint when one is due. A disk that cannot take it is a warning, and is tried again later."""

    def __init__(
        self, journal: "Journal", trainer: "MeasuredTrainer", validator: "Validator", identity: dict[str, str]
    ):
        self.job, self.journal, self.warn = journal.job, journal, journal.warn
        self.trainer, self.validator, self.identity = trainer, validator, identity
        self._last_s = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether one is to be written after `step`."""
        every, best = self.job.config.checkpoint, self.validator.best
        if step == self.job.total_steps or self.validator.ended_early:
            return True  # what comes after it may be ended too, and is then finished by --resume
        if best and best.step == step and (self.job.config.eval.keep_best or every.every != "never"):
            return True
        if every.every_steps is not None:
            return step % every.every_steps == 0
        return every.every_s is not None and time.perf_counter() - self._last_s >= every.every_s

    def write(self, step: int) -> None:
        """Write one now, between two steps, unless the weights have diverged; remove those that are too many.

        Rank 0 writes that of all ranks: their weights and moments are the same, or parts of them.
        """
        ranks = self.job.ranks
        if ranks.rank and ranks.parts == 1:
            return
        if not self.sound():
            self.warn(f"step {step}: no checkpoint, for its weights have diverged; {self.journal.kept}")
            return
        tensors, state = collect(self.trainer)
        if ranks.rank:
            return
        state |= {"identity": self.identity, "wall_s": self.journal.wall_s, "held_out": self.validator.state()}
        state["evaluations_since_best"] = self.validator.since_best
        self._last_s = time.perf_counter()
        try:
            self.journal.checkpoint = save(self.job.folder, step, tensors, state)
        except OSError as error:
            self.warn(f"step {step}: no checkpoint could be written ({error.strerror or error}); {self.journal.kept}")
            return
        if step < self.job.total_steps:  # that of the last step is there only until the run is completed
            best = self.validator.best
            prune(self.job.folder, self.job.config.checkpoint.keep, best.step if best else None)

    def sound(self) -> bool:
        """Whether the weights as they are now have not diverged: tried on a row of the last step that had a loss."""
        good = next((step.step for step in reversed(self.journal.steps) if math.isfinite(step.loss)), 1)
        return self.validator.sound(self.job.data.encoded(good - 1)[0])

    def bring_back_best(self, step: int) -> int:
        """After the last step: with eval.keep_best the weights of the best one. Returns the step they are of."""
        best, ranks = self.validator.best, self.job.ranks
        if not self.job.config.eval.keep_best or best is None or best.step == step:
            return step
        own = self._restored(best.step) if ranks.parts > 1 or not ranks.rank else None
        restored = ranks.agree(own)
        if restored:
            ranks.copy_from_first(trained(self.trainer.model).values())
        return best.step if restored else step

    def _restored(self, step: int) -> bool:
        """Whether the weights are those of the checkpoint of a step now."""
        from fasttune.core import restore, resume

        path = self.job.folder / FOLDER / f"step-{step}"
        try:
            found = resume.read(path)
            if problem := resume.misfit(found, self.trainer.model):
                raise resume.Broken(problem)
        except resume.Broken as error:
            self.warn(f"eval.keep_best: {path.name} does not hold ({error}): the weights of the last step are saved")
            return False
        restore.restore_weights(self.trainer.model, found, self.job.ranks)
        return True


def identity(job: "Job") -> dict[str, str]:
    """What a checkpoint belongs to; a run does not resume from one of something else. Before the first step only.

    Settings that change what is trained, the rows themselves, and a checksum of every weight.
    """
    from fasttune.core import what_ran

    found: dict[str, str] = {}
    settings = job.config.model_dump(mode="json")
    for section in SECTIONS:
        values = settings[section] if isinstance(settings[section], dict) else {"": settings[section]}
        found |= {f"{section}.{key}".rstrip("."): str(value) for key, value in values.items()}
    found = {key: value for key, value in found.items() if key not in FREE}
    found[WHOLE] = str(job.total_steps)
    found["data.chat_template"] = _template(job.config.data.chat_template)
    found["data.eval_share"] = str(job.config.data.eval_share)
    found["data.deduplicate"] = str(job.config.data.deduplicate)
    for number, (rows, weight) in enumerate(zip(job.data.parts, job.data.weights, strict=True), 1):
        found[f"rows of data set {number}"] = f"{len(rows)} rows × {weight:g} ({rows.checksum})"
    if (data := job.config.data).layout == "concat":
        found["data.layout"] = f"concat, cross_document={data.cross_document}, redraw={data.redraw}"
    if data.tokenization != "vanilla":
        found["data.tokenization"] = _tokenization(job.config)
    found["weights of the base model"] = job.base_weights
    if job.config.lora.init in RESIDUAL:  # not the residual weights: their last bits differ by machine
        found["start of the adapter"] = what_ran.fingerprint(trained(job.model).values(), None)
    return found


def _template(given: str | None) -> str:
    """By what it says: a file may lie elsewhere, or have been changed."""
    if given is None:
        return str(None)
    from fasttune.data import chat_templates

    return f"sha256 {hashlib.sha256(chat_templates.read(given).encode()).hexdigest()[:16]}"


def _tokenization(config: "Config") -> str:
    """As `_template`, of how tokens are split."""
    from fasttune.data import corpus

    told = asdict(corpus.splitting(config))
    if affixes := told.pop("affixes"):
        told["affixes"] = f"sha256 {hashlib.sha256(repr(affixes).encode()).hexdigest()[:16]}"
    return ", ".join(f"{name} {value}" for name, value in told.items())


def trained(model: Any) -> Tensors:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def collect(trainer: Any) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """(tensors by file, plain values) of a trainer between two steps; after the last one without the moments."""
    import numpy as np
    import torch

    optimizer, whole = trainer.optimizer.state_dict(), trainer.ranks.whole
    if trainer.state.global_step == trainer.state.max_steps:
        optimizer["state"] = {}
    moments: Tensors = {}
    plain: dict[str, Any] = {}
    for index, entries in optimizer["state"].items():
        for name, value in flat(whole(entries)).items():
            (moments if torch.is_tensor(value) else plain)[f"{index}.{name}"] = value
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    generators = {"torch": torch.get_rng_state()} | {f"cuda.{i}": state for i, state in enumerate(cuda)}
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "step": trainer.state.global_step,
        "optimizer": {"groups": _numbers(optimizer["param_groups"]), "plain": plain},
        "scheduler": _numbers(trainer.lr_scheduler.state_dict()),
        "random": {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]},
    }
    return {"weights": whole(trained(trainer.model)), "optimizer": moments, "random": generators}, state


def flat(entries: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter without nesting. bitsandbytes' 8-bit optimizers keep a dict in it, and load it as well
    without; torchao's moments are made of several tensors.
    """
    found: dict[str, Any] = {}
    for name, value in entries.items():
        if hasattr(value, "__tensor_flatten__"):
            found |= {f"{name}:{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            found |= value if isinstance(value, dict) else {name: value}
    return found


def _numbers(value: Any) -> Any:
    """torchao keeps a learning rate as a tensor, which JSON cannot."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def save(run: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> Path:
    """Write `checkpoints/step-N/`, which appears complete or not at all. Raises OSError, and leaves nothing behind."""
    root = _root(run)
    made = Path(tempfile.mkdtemp(prefix=f".step-{step}-", dir=root))
    try:
        for name, group in tensors.items():
            _save_tensors(made / f"{name}.safetensors", group)
        (made / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        system.make_readable(made)
        for path in (*made.iterdir(), made):
            _to_disk(path)
        final = root / f"step-{step}"
        if final.exists():  # one that did not hold and was skipped, written again by the resumed run
            remove(final)
        made.rename(final)
        _to_disk(root)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return final


def keep_start(run: Path, adapter: Path) -> None:
    """Beside the checkpoints, what the base weights of a run (settings.RESIDUAL) were split by. Raises OSError."""
    root = _root(run)
    made = root / f".step-{START}"  # swept away as what is left of a checkpoint
    shutil.copyfile(adapter, made)
    made.rename(root / START)


def _root(run: Path) -> Path:
    root = run / FOLDER
    if root.is_symlink():
        raise OSError(f"{root} is a link, and nothing is written through one")
    root.mkdir(parents=True, exist_ok=True)
    return root


def steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints of a run, the newest first, whether they hold or not."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (run / FOLDER).glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`."""
    for step, path in steps(run)[keep:]:
        if step != best:
            remove(path)


def remove(path: Path) -> None:
    """Out of its name first: what a process that is killed meanwhile leaves is no checkpoint, and is swept away."""
    gone = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone)


def sweep(run: Path) -> None:
    """Remove what a process that was killed while saving has left. Only under the run's lock."""
    for path in (run / FOLDER).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _save_tensors(path: Path, tensors: Tensors) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # its own class even for a full disk
        raise OSError(str(error)) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
