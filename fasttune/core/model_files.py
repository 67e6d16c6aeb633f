"""The files of a model that came from others: what is refused before a library reads them."""

import json
import re
from pathlib import Path
from typing import Any

from fasttune import hub, system
from fasttune.core.memory import NEEDED, Shape
from fasttune.errors import ModelError, first_line
from fasttune.settings import ModelConfig

TEMPLATES = "additional_chat_templates"
MAX_JSON_BYTES = 100 << 20  # the largest tokenizer.json is 33 MB (Gemma 3)
HUGE_ID = rb'[^\\]"\s*:\s*\d{8,}\s*[,}]'  # tokenizers would fill all ids below it, for minutes
# What a config.json may say: far above any model there is, and small enough to be built and counted.
MOST = {"num_hidden_layers": 2000, "hidden_size": 10**6, "vocab_size": 10**7, "max_position_embeddings": 10**9}
MOST_A_BYTE = 16  # parameters: those of 4-bit weights are two


def locate(name: str) -> str:
    """Folder or hub id to load weights from. Raises ModelError."""
    found = source(name)
    check_name(name)
    folder = Path(found)
    pickles = [path.name for kind in ("pytorch_model", "adapter_model") for path in folder.glob(f"{kind}*.bin")]
    if folder.is_dir() and pickles and not any(folder.glob("*.safetensors")):
        raise pickled(f"model.name: {name}", min(pickles))
    return found


def source(name: str) -> str:
    """Folder or hub id, for weights or for a tokenizer. Raises ModelError for a folder that could block or drown us."""
    folder = folder_of(name)
    if folder is None:
        hub.look()
        return name
    check_folder(folder)
    for path in folder.iterdir():
        if path.suffix == ".json" and path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is; get it again")
        if path.name == "tokenizer.json" and re.search(HUGE_ID, path.read_bytes()):
            raise ModelError(f"{path}: has a token id above 9,999,999, which no model has a row for; get it again")
    return str(folder)


def check_name(name: str) -> None:
    """Raise ModelError for a model that `locate` cannot take, before anything heavy is imported."""
    folder = folder_of(name)
    if folder is None:
        if is_path(name):
            raise ModelError(f"model.name: {name[:150]}: no such folder; check the spelling, or give a hub id")
        hub.look()
        return
    whole = (folder / "config.json").is_file()
    for adapter in (folder, folder / "adapter")[: 1 if whole else 2]:  # a model may have a folder of that name
        if (adapter / "adapter_config.json").is_file():
            raise _is_adapter(f"`fasttune merge {folder} --out DIR`")
    if not whole:
        raise ModelError(f"model.name: {name[:150]} has no config.json; name the folder of a model")


def check_folder(folder: Path, weights_too: bool = False) -> None:
    """Raise ModelError for a pipe in a model's or adapter's folder, and for a link that leads out of it: what is behind
    it (a template, say) would be copied into what is saved. Weights are only read, unless they are to be merged.
    """
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache: all files are links in it
    for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        if system.not_a_file(path):
            raise ModelError(f"{path} is a pipe or a device, not a file: remove it, or get the model again")
        copied = path.name == TEMPLATES or (path.is_file() and (weights_too or path.suffix != ".safetensors"))
        if copied and path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ModelError(
                f"{path} is a link out of its folder, to {path.resolve()}, and nothing is copied through one: put the "
                "file itself there"
            )


def folder_of(name: str) -> Path | None:
    """The folder that a name is of; None where there is none, for a hub id and for what can be no name of a file."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def is_path(name: str) -> bool:
    """Whether a name can only be a folder: a hub id is NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_adapter(merge: str) -> ModelError:
    return ModelError(
        f"model.name is an adapter, no model: merge it first ({merge}) and name that folder; to resume a run that was "
        "interrupted: --resume"
    )


def check_no_adapter(config: ModelConfig) -> None:
    """Raise ModelError where a hub id is that of an adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if folder_of(config.name) is None and find_adapter_config_file(config.name, revision=config.revision):
        raise _is_adapter(f"`hf download {config.name} --local-dir DIR`, then `fasttune merge DIR`")


def check_architecture(name: str, found: Any) -> None:
    """Raise ModelError for sizes in config.json that no model has, or more than its weights can hold."""
    for size, most in MOST.items():
        if not isinstance(value := getattr(found, size, None) or 1, int) or not 0 < value <= most:
            raise ModelError(f"model.name: {name[:100]}: config.json says {size} {str(value)[:50]}; get it again")
    parameters = Shape.of(found).parameters if all(getattr(found, size, None) for size in NEEDED) else 0
    folder = folder_of(name)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder else 0
    if weights and parameters > MOST_A_BYTE * weights:
        raise ModelError(
            f"model.name: {name[:100]}: config.json describes {parameters:,} parameters, more than its weights of "
            f"{weights:,} bytes can hold; get both again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file of others. Raises ModelError."""
    try:
        if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:  # not of a pipe, which may never end
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)[:100]}); it should be JSON") from error
    raise ModelError(f"{path}: cannot be read; it should be a file with one JSON object")


def pickled(what: str, file: str) -> ModelError:
    """The error for weights that are not safetensors."""
    return ModelError(
        f"{what} has its weights as a pickle ({file}), which may run code when it is read; convert them to "
        "safetensors (https://huggingface.co/docs/safetensors/convert-weights), or choose a model that has them"
    )
