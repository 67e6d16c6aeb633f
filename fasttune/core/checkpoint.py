"""Checkpoints on disk: whole or not there, checked before they are believed, never pickled.

RUN/checkpoints/step-N/   weights, optimizer, random .safetensors · state.json
                          manifest.json: size and SHA-256 of each of them, written last
RUN/checkpoints/pissa.safetensors   the adapter that a PiSSA run began with
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune import system

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
START = "pissa.safetensors"

Tensors = dict[str, Any]  # name → torch.Tensor


class Broken(Exception):
    """A checkpoint that does not hold: why, in a few words."""


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
        system.make_readable(made)
        for path in (*made.iterdir(), made):
            _to_disk(path)
        final = root / f"step-{step}"
        if final.exists():  # one that did not hold, passed over by the run that now comes past it again
            remove(final)
        made.rename(final)
        _to_disk(root)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return final


def keep_start(run: Path, adapter: Path) -> None:
    """Beside the checkpoints, what the base weights of a PiSSA run were split by. Raises OSError."""
    root = run / FOLDER
    if root.is_symlink():
        raise OSError(f"{root} is a link, and nothing is written through one")
    root.mkdir(parents=True, exist_ok=True)
    made = root / f".step-{START}"  # swept away as what is left of a checkpoint
    shutil.copyfile(adapter, made)
    made.rename(root / START)


def steps(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints of a run, the newest first, whether they hold or not."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (run / FOLDER).glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest(
    run: Path, misfit: Callable[[Checkpoint], str | None] = lambda found: None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that holds and is no `misfit`, and why newer ones were passed over."""
    passed_over: list[str] = []
    for _, path in steps(run):
        try:
            found = read(path)
            if (problem := misfit(found)) is None:
                return found, passed_over
        except Broken as error:
            problem = str(error)
        passed_over.append(f"{path.name}: {problem}")
    return None, passed_over


def broken(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None if every one is what the manifest says."""
    try:
        files = json.loads(_regular(path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside of the checkpoint"
            size = _regular(path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, not {expected['bytes']:,}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} was changed after it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Broken as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None if STATE in files else f"{STATE} is not in {MANIFEST}"


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


def read(path: Path) -> Checkpoint:
    """A checkpoint whose files are what its manifest says. Raises Broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if problem := broken(path):
        raise Broken(problem)
    try:
        files = [path / name for name in json.loads((path / MANIFEST).read_text(encoding="utf-8"))]
        tensors = {file.stem: load_file(file) for file in files if file.suffix == ".safetensors"}
        return Checkpoint(path, tensors, json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise Broken(f"its files cannot be read ({type(error).__name__})") from error


def _regular(path: Path) -> Path:
    if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead out of the checkpoint, and a pipe never ends
        raise Broken(f"{path.name} is a link or a pipe, not a file of the checkpoint")
    return path


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
