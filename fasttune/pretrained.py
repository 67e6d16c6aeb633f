"""A model's files without its weights: where they are, its architecture and its tokenizer.

transformers is imported inside the functions: whoever trains has imported unsloth first (model.py says why).
"""

import re
from pathlib import Path
from typing import Any

from fasttune import builtin, hub, paths
from fasttune.config import ModelConfig
from fasttune.errors import ModelError

# As huggingface_hub (utils/_http.py, file_download.py) and transformers (utils/hub.py) write them: numbers alone are in
# any text. MISSING is asked first, for there the hub answers 401 too and adds that the repository may be gated.
MISSING = r"Repository Not Found|not a valid model identifier|404 (Client Error|Not Found)|Unrecognized model"
GATED = r"gated repo|40[13] (Client Error|Forbidden|Unauthorized)"
UNREACHABLE = r"[Cc]onnection\b|couldn't connect|offline mode|[Ff]ailed to resolve|name resolution|Max retries"
TOO_LARGE = r"out of memory|can't allocate memory"  # torch, on a GPU and on a CPU


def locate(config: ModelConfig) -> str:
    """Folder or hub id to load from. A built-in model is made at its first use. Raises ModelError."""
    if config.name.startswith("builtin:"):
        return str(builtin.path(config.name))
    folder = Path(config.name).expanduser()
    if not folder.is_dir():
        return config.name
    paths.check_model(folder)
    pickles = [path.name for kind in ("pytorch_model", "adapter_model") for path in folder.glob(f"{kind}*.bin")]
    if pickles and not any(folder.glob("*.safetensors")):
        raise _pickled(config.name, min(pickles))
    return str(folder)


def read_architecture(config: ModelConfig) -> Any:
    """The model's transformers config, without its weights. Raises ModelError with the remedy."""
    source = locate(config)
    import transformers

    try:
        found = hub.patiently(
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
        tokenizer = hub.patiently(
            lambda: transformers.AutoTokenizer.from_pretrained(
                locate(config), revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        )
    except (OSError, ValueError) as error:
        raise explain(config.name, error) from error
    if not getattr(tokenizer, "is_fast", False):  # it alone can say which characters a token stands for
        raise ModelError(
            f"model.name: {config.name} has no fast tokenizer (tokenizer.json), so labels cannot be placed"
        )
    return tokenizer


def explain(name: str, error: Exception) -> ModelError:
    """One line for the usual failures of a load; the original error stays as its cause."""
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError):
        return ModelError(
            f"model.name: {name}: {text[:300]}; try again later, or download it elsewhere and give the folder"
        )
    if re.search(TOO_LARGE, text):
        return ModelError(
            f"model.name: {name} does not fit into the memory that is free; end what else is using it (`nvidia-smi` "
            "lists the programs on a GPU), or choose what fits: `fasttune plan` says what would"
        )
    if re.search(MISSING, text):
        return ModelError(
            f"model.name: {name} is no model folder and no hub id that can be read; check the spelling, and run "
            "`hf auth login` for a private one"
        )
    if re.search(GATED, text):
        return ModelError(
            f"model.name: {name} is gated: accept its licence at https://huggingface.co/{name}, then run "
            f"`hf auth login`, and `hf download {name} config.json` to see that access is granted"
        )
    if "trust_remote_code" in text:
        return ModelError(
            f"model.name: {name} comes with code of its own, which is not run unless asked for; read that code, then "
            "add model.trust_remote_code=true to the command (eval, generate, merge: --trust-remote-code)"
        )
    if "file named model.safetensors" in text:
        return _pickled(name, "pytorch_model.bin")
    if re.search(UNREACHABLE, text):
        if hub.is_offline():
            return ModelError(
                f"model.name: {name} is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set; "
                f"check the name, unset it, or run `hf download {name}` where there is a network"
            )
        return ModelError(
            f"model.name: {name} is neither a local folder nor in the hub's cache, and the hub cannot be reached; "
            "check the name and the network, or download it elsewhere and give the folder"
        )
    return ModelError(f"model.name: {name} cannot be loaded: {text[:300]}")


def _pickled(name: str, file: str) -> ModelError:
    return ModelError(
        f"model.name: {name} has its weights as a pickle ({file}), which may run code when it is read; convert them to "
        "safetensors (https://huggingface.co/docs/safetensors/convert-weights), or choose a model that has them"
    )
