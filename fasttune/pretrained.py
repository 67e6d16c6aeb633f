"""A model's files without its weights: where they are, its architecture and its tokenizer.

transformers is imported inside the functions: whoever trains has imported unsloth first (model.py says why).
"""

from pathlib import Path
from typing import Any

from fasttune import builtin
from fasttune.config import ModelConfig
from fasttune.errors import ModelError


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
        found = transformers.AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise explain(config.name, error) from error
    return getattr(found, "get_text_config", lambda: found)()


def read_tokenizer(config: ModelConfig) -> Any:
    """The model's fast tokenizer. Raises ModelError with the remedy."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            locate(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise explain(config.name, error) from error
    check_fast(tokenizer, config.name)
    return tokenizer


def check_fast(tokenizer: Any, name: str) -> None:
    """Raise ModelError for a tokenizer that cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"model.name: {name} has no fast tokenizer (tokenizer.json), so labels cannot be placed")


def explain(name: str, error: Exception) -> ModelError:
    """One line for the usual failures of a load; the original error stays as its cause."""
    text = " ".join(str(error).split())
    if "gated" in text or "401" in text or "403" in text:
        return ModelError(f"model.name: {name} is gated: accept its licence on its page, then `hf auth login`")
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
