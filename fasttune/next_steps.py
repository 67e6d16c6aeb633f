"""The commands that come after a run, with its real paths, quoted for a shell."""

import json
import shlex
from pathlib import Path

from fasttune.metrics import RunResult

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank takes these, vllm/config/lora.py


def after_training(result: RunResult) -> list[tuple[str, str]]:
    """(what for, command) of a run that has saved an adapter or a model; nothing of any other."""
    adapter, model = Path(result.output_dir, "adapter"), Path(result.output_dir, "model")
    if not adapter.exists() and not model.exists():
        return []
    commands = of_run(result.output_dir, result.plain_text, adapter.exists(), "merged")
    served = serve_adapter(adapter, result.name, str(adapter)) if adapter.exists() else serve_model(str(model))
    return [*commands, *([("serve", served)] if served else [])]


def of_run(run: str, plain_text: bool, adapter: bool, merged: str) -> list[tuple[str, str]]:
    """Ask it, score it, and make one model of adapter and base. `eval` has nothing by itself for plain text."""
    name = shlex.quote(run)
    found = [("ask it", f"fasttune generate {name} " + ("--prompt 'Once upon a time'" if plain_text else "--chat"))]
    found += [] if plain_text else [("score it", f"fasttune eval {name}")]
    return found + ([("merge it", f"fasttune merge {name} --out {shlex.quote(merged)}")] if adapter else [])


def serve_model(folder: str) -> str:
    return f"vllm serve {shlex.quote(folder)}"


def serve_adapter(adapter: Path, name: str, shown: str, base: str | None = None) -> str | None:
    """vLLM with the base and this adapter on it; None where vLLM would refuse it (rank, embeddings), or it is damaged.

    shown, base: paths to write in place of the adapter's own and its base's.
    """
    try:
        said = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base = base or said["base_model_name_or_path"]
        rank = max([said["r"], *(said.get("rank_pattern") or {}).values()])
        allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if allowed is None or said.get("modules_to_save") or not base:
        return None
    module = f"{'-'.join(name.replace('=', '-').split())}={shown}"
    served = f"{serve_model(base)} --enable-lora --lora-modules {shlex.quote(module)}"
    return f"{served} --max-lora-rank {allowed}"
