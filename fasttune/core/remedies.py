"""What helps when a model cannot be loaded, or does not fit into memory. Loaded only then."""

import re

from fasttune import hub
from fasttune.config import Config
from fasttune.core.model_files import folder_of, pickled
from fasttune.errors import FasttuneError, HubError, ModelError

# As torch, huggingface_hub (utils/_http.py, file_download.py) and
# transformers (utils/hub.py) write them: numbers alone are in any text. The order matters: of a missing repository the
# hub answers 401 too, and adds that it may be gated.
REMEDIES = {
    r"out of memory|can't allocate memory": "does not fit into the memory that is free; end what else is using it "
    "(`nvidia-smi` lists the programs on a GPU), or choose what fits: `fasttune plan` says what would",
    r"Repository Not Found|not a valid model identifier|404 (Client Error|Not Found)|Unrecognized model": "is no model "
    "folder and no hub id that can be read; check the spelling, and run `hf auth login` for a private one",
    r"gated repo|40[13] (Client Error|Forbidden|Unauthorized)": "is gated: accept its licence at "
    "https://huggingface.co/{name}, then run `hf auth login`, and `hf download {name} config.json` to see that access "
    "is granted",
    r"trust_remote_code": "comes with code of its own, which is not run unless asked for; read that code, then add "
    "model.trust_remote_code=true to the command (eval, generate, merge: --trust-remote-code)",
}
NO_SAFETENSORS = "file named model.safetensors"
UNREACHABLE = (
    r"[Cc]onnection\b|couldn't connect|offline mode|[Ff]ailed to resolve|name resolution|Max retries|timed out"
)


def explain(name: str, error: BaseException) -> FasttuneError:
    """One line for the usual failures of a load; the original error stays as its cause."""
    if isinstance(error, FasttuneError):
        return error
    text = " ".join(str(error).split())
    for said, remedy in REMEDIES.items():
        if re.search(said, text):
            kind = HubError if remedy.startswith("is gated") else ModelError
            return kind(f"model.name: {name} {remedy.format(name=name)}")
    if NO_SAFETENSORS in text and (folder := folder_of(name)) and not any(folder.glob("*.bin")):
        return ModelError(f"model.name: {name} has no weights (model.safetensors); get the whole model")
    if NO_SAFETENSORS in text:
        return pickled(f"model.name: {name}", "pytorch_model.bin")
    if re.search(UNREACHABLE, text):
        remedy = "the hub cannot be reached; check the name and the network, try again later, or download it elsewhere"
        remedy += " and give the folder"
        import huggingface_hub

        if why := hub.away():
            remedy = remedy.replace("reached", f"reached ({why})", 1)
        elif huggingface_hub.is_offline_mode():
            remedy = f"HF_HUB_OFFLINE is set; check the name, unset it, or run `hf download {name}` where there is a "
            remedy += "network"
        return HubError(f"model.name: {name} is neither a local folder nor in the hub's cache, and {remedy}")
    known = isinstance(error, OSError | ValueError | RuntimeError)
    text = text if known else f"one of its files is damaged or not supported ({type(error).__name__}: {text})"
    return ModelError(f"model.name: {name[:100]} cannot be loaded: {text[:180]}")


def smaller(config: Config, gpu: bool) -> list[str]:
    """Settings that take less memory, the cheapest first (docs/oom.md); not those that are set already."""
    train, full = config.train, config.train.method == "full"
    recompute = "unsloth" if gpu else "full"  # "unsloth" moves activations from a GPU to the host
    ways = {
        f"train.gradient_checkpointing={recompute}": train.gradient_checkpointing not in (recompute, "unsloth"),
        "train.optimizer=adamw_8bit": gpu and full and train.optimizer != "adamw_8bit",
        f"model.max_length below {config.model.max_length:,}": True,
        "train.method=lora": full,
        "model.quantization=nf4": gpu and not full and config.model.quantization == "none",
        "a lower lora.rank": not full,
        "UNSLOTH_FSDP2=1 and --gpus 2 or more, which share the model": gpu and config.model.quantization == "none",
        "a smaller model, or a GPU with more memory": True,
    }
    return [way for way, possible in ways.items() if possible]
