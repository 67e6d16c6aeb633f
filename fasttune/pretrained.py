"""A model's files without its weights: where they are, its architecture and its tokenizer.

transformers is imported inside the functions: whoever trains has imported unsloth first (model.py says why).
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttune import builtin
from fasttune.config import ModelConfig
from fasttune.errors import ModelError

PAUSES_S = (2, 5, 15)  # before the hub is asked again
AGAIN = {429, 500, 502, 503, 504}  # HTTP: busy, or a fault of its own


def locate(config: ModelConfig) -> str:
    """Folder or hub id to load from. A built-in model is made at its first use. Raises ModelError."""
    if config.name.startswith("builtin:"):
        return str(builtin.path(config.name))
    folder = Path(config.name).expanduser()
    return str(folder) if folder.is_dir() else config.name


def read_architecture(config: ModelConfig) -> Any:
    """The model's transformers config, without its weights. Raises ModelError with the remedy."""
    source = locate(config)
    import transformers

    try:
        found = patiently(
            lambda: transformers.AutoConfig.from_pretrained(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        )
    except (OSError, ValueError) as error:
        raise explain(config.name, error) from error
    return getattr(found, "get_text_config", lambda: found)()


def read_tokenizer(config: ModelConfig) -> Any:
    """The model's fast tokenizer. Raises ModelError with the remedy."""
    import transformers

    try:
        tokenizer = patiently(
            lambda: transformers.AutoTokenizer.from_pretrained(
                locate(config), revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        )
    except (OSError, ValueError) as error:
        raise explain(config.name, error) from error
    check_fast(tokenizer, config.name)
    return tokenizer


def patiently(ask: Callable[[], Any]) -> Any:
    """`ask()`, and again after each of PAUSES_S while the hub is too slow or too busy to answer."""
    for pause_s in PAUSES_S:
        try:
            return ask()
        except Exception as error:
            if os.environ.get("HF_HUB_OFFLINE") == "1" or not _is_passing(error):
                raise
            print(f"the hub does not answer ({type(error).__name__}): asking again in {pause_s} s")  # into library.log
        time.sleep(pause_s)
    return ask()


def _is_passing(error: BaseException | None) -> bool:
    """A time-out or an answer of AGAIN, at any depth: transformers wraps what the hub's library raises."""
    while error is not None:
        if "Timeout" in type(error).__name__ or getattr(getattr(error, "response", None), "status_code", None) in AGAIN:
            return True
        error = error.__cause__ or error.__context__
    return False


def check_fast(tokenizer: Any, name: str) -> None:
    """Raise ModelError for a tokenizer that cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"model.name: {name} has no fast tokenizer (tokenizer.json), so labels cannot be placed")


def explain(name: str, error: Exception) -> ModelError:
    """One line for the usual failures of a load; the original error stays as its cause."""
    text = " ".join(str(error).split())
    if "gated" in text or "401" in text or "403" in text:
        return ModelError(
            f"model.name: {name} is gated: accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        )
    if any(
        sign in text for sign in ("connect", "offline", "resolve", "Max retries", "couldn't find them in the cached")
    ):
        return ModelError(
            f"model.name: {name} is neither a local folder nor in the hub's cache, and the hub cannot be reached; "
            "check the name and the network, or download it elsewhere and give the folder"
        )
    if "not a valid model identifier" in text or "404" in text or "Unrecognized model" in text:
        return ModelError(f"model.name: {name} is no model folder and no hub id that can be read; check the spelling")
    return ModelError(f"model.name: {name} cannot be loaded: {text[:300]}")
