"""Checkpoints on disk: whole or not there, checked before they are believed, never pickled.

RUN/checkpoints/step-N/   weights, optimizer, random .safetensors · state.json
                          manifest.json: size and SHA-256 of each of them, written last
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune import paths

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"

Tensors = dict[str, Any]  # name → torch.Tensor


@dataclass(frozen=True)
class Checkpoint:
    """One that holds. tensors: by the name of their file; state: plain values (see state.py)."""

    path: Path
    tensors: dict[str, Tensors]
    state: dict[str, Any]


def save(run: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> Path:
    """Write `checkpoints/step-N/`, which appears complete or not at all. Raises OSError, and leaves nothing behind."""
    root = run / FOLDER
    if root.is_symlink():
        raise OSError(f"{root} is a link, and nothing is written through one")
    root.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".step-{step}-", dir=root))
    try:
        for name, group in tensors.items():
            _save_tensors(made / f"{name}.safetensors", group)
        (made / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        paths.readable(made)
        for path in (*made.iterdir(), made):
            _to_disk(path)
        final = root / f"step-{step}"
        if final.exists():  # one that did not hold, passed over by the run that now comes past it again
            shutil.rmtree(final)
        made.rename(final)
        _to_disk(root)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return final


def steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints of a run, the newest first, whether they hold or not."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (run / FOLDER).glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that holds, and why newer ones were passed over."""
    passed_over = []
    for _, path in steps(run):
        if problem := broken(path):
            passed_over.append(f"{path.name}: {problem}")
        else:
            return read(path), passed_over
    return None, passed_over


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is what the manifest says."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside of the checkpoint"
            if (path / name).is_symlink():
                return f"{name} is a link, not a file of the checkpoint"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, not {expected['bytes']:,}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} was changed after it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if STATE in files else f"{STATE} is not in {MANIFEST}"


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`."""
    for step, path in steps(run)[keep:]:
        if step != best:
            shutil.rmtree(path, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what a process that was killed while saving has left. Only under the run's lock."""
    for path in (run / FOLDER).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """One that is not `broken`."""
    from safetensors.torch import load_file

    files = [path / name for name in json.loads((path / MANIFEST).read_text(encoding="utf-8"))]
    tensors = {file.stem: load_file(file) for file in files if file.suffix == ".safetensors"}
    return Checkpoint(path, tensors, json.loads((path / STATE).read_text(encoding="utf-8")))


def _save_tensors(path: Path, tensors: Tensors) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # its own class even for a full disk
        raise OSError(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
