"""A model that is there to be used: a finished run, a model or adapter folder, a built-in model or a hub id.

finished = open_run("runs/quickstart-20261121-120000")      # reads two small files
model, tokenizer = load(finished, dtype_for(finished))      # base weights, and the adapter on them
"""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fasttune import config as configuration, paths
from fasttune.config import Config, ModelConfig, looks_like_hub
from fasttune.core import builtin, pretrained
from fasttune.errors import ConfigError, ModelError
from fasttune.tools import adapter as adapters

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Finished:
    """What was asked for, and where its parts are. `warnings` are for the person, one line each."""

    name: str  # as it was asked for
    base: ModelConfig  # base weights, or all of them where there is no adapter
    adapter: Path | None = None  # PEFT format
    run: Path | None = None  # output folder of fasttune train
    config: Config | None = None  # of that run, resolved
    result: dict[str, Any] | None = None  # its run.json, where there is one
    warnings: list[str] = field(default_factory=list)

    @property
    def weights(self) -> str:
        """The adapter, else the model, as a path or id: what `transformers` or `peft` would be given."""
        return str(self.adapter) if self.adapter else self.base.name

    @property
    def tokenizer_source(self) -> ModelConfig:
        """Where the tokenizer with the chat template of the training is: beside the adapter, else with the base."""
        beside = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.base.model_copy(update={"name": str(self.adapter), "revision": None}) if beside else self.base

    def reading(self, source: str) -> tuple[str, dict[str, str]]:
        """(split, data.columns) of the run for rows that its config names; ("train", {}) for all others."""
        data = self.config.data if self.config else None
        if data is None or source not in (data.eval, *data.sources):
            return "train", {}
        return data.held_out_split if source == data.eval else data.split, data.columns


def open_run(name: str, trust_remote_code: bool = False) -> Finished:
    """The parts of RUN (output folder of `fasttune train`) or MODEL (folder, `builtin:` name, hub id).

    Only the command now given may switch on the model's own code, never a file that is there. Imports nothing heavy and
    loads no weights. Raises ModelError in one line.
    """
    found = _open(name)
    return replace(found, base=found.base.model_copy(update={"trust_remote_code": trust_remote_code}))


def _open(name: str) -> Finished:
    if name.startswith("builtin:"):
        builtin.check(name)
        return Finished(name, _base(name))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or not looks_like_hub(name):
            raise ModelError(f"{name}: no such folder; name a run (runs/NAME-DATE), a model folder or a hub id")
        _refuse_missing_run(name, folder)
        return Finished(name, _base(name))
    if folder.name in ("adapter", "model") and (folder.parent / "config.yaml").is_file():
        folder = folder.parent
    if (folder / "config.yaml").is_file():
        return _run(name, folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter(name, folder)
    if (folder / "config.json").is_file():
        return Finished(name, _base(str(folder)))
    raise ModelError(
        f"{name}: holds no run (config.yaml), no adapter (adapter_config.json) and no model (config.json); "
        "name the output folder of `fasttune train`, or a model"
    )


def _refuse_missing_run(name: str, folder: Path) -> None:
    """runs/NAME also looks like a hub id: where the folder runs is here, a run is meant."""
    if folder.parent.is_dir():
        runs = sorted(folder.parent.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
        newest = ", ".join(str(path.parent) for path in runs[:3])
        there = f"the newest there: {newest}" if newest else "there is none; for a hub id go to another folder"
        raise ModelError(f"{name}: no such run in {folder.parent}/; {there}")


def _run(name: str, folder: Path) -> Finished:
    try:
        config = configuration.load(folder / "config.yaml", [f"{configuration.TRUST}=false"])
    except ConfigError as error:
        raise ModelError(f"{name}: its config.yaml cannot be used: {error.problems[0]}") from error
    result = pretrained.read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    status = result.get("status") if result else "running"
    status = "not finished" if status == "running" else status  # or it was killed
    kind = "model" if config.train.method == "full" else "adapter"
    if not (folder / kind).is_dir():
        go_on = f"fasttune train --resume {shlex.quote(str(folder))}"
        raise ModelError(f"{name}: this run is {status} and has no {kind}/; go on with it: {go_on}")
    paths.check_model(folder / kind)
    warnings = [] if status == "completed" else [f"{name}: this run is {status}, so its {kind}/ is not its last word"]
    if kind == "model":
        base = config.model.model_copy(update={"name": str(folder / "model"), "revision": None})
        return Finished(name, base, None, folder, config, result, warnings)
    adapters.settings(folder / "adapter")
    return Finished(name, config.model, folder / "adapter", folder, config, result, warnings)


def _adapter(name: str, folder: Path) -> Finished:
    """A PEFT folder that is no part of a run: it names its base itself."""
    paths.check_model(folder)
    said = adapters.settings(folder)
    base = said.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{name}: its adapter_config.json names no base model; set base_model_name_or_path in it")
    if pretrained.is_path(base) and pretrained.folder_of(base) is None:
        raise ModelError(
            f"{folder / adapters.SETTINGS}: base_model_name_or_path is {base[:100]}, which is not here; set it to the "
            "folder or hub id of that base model"
        )
    pretrained.check(base)
    return Finished(name, _base(base, said.get("revision")), folder)


def _base(name: str, revision: str | None = None) -> ModelConfig:
    return ModelConfig(name=name, revision=revision)


def dtype_for(finished: Finished) -> Dtype:
    """As it was trained where there is a GPU, bfloat16 for other models; float32 on a CPU. Imports torch."""
    from fasttune.core import model as models

    if not models.torch.cuda.is_available():
        return "float32"
    trained = finished.config.model.dtype if finished.config else "auto"
    return "bfloat16" if trained == "auto" else trained


def load(finished: Finished, dtype: Dtype) -> tuple[Any, Any]:
    """(model ready to generate, tokenizer with the chat template of the training). Raises ModelError.

    The base is quantized as it was in training; where there is no GPU for that, `finished.warnings` says so.
    """
    from fasttune.core import model as models

    base = finished.base
    if base.quantization == "nf4" and not models.torch.cuda.is_available():
        finished.warnings.append("trained on nf4 weights, which need a GPU: used here on the unquantized base")
        base = base.model_copy(update={"quantization": "none"})
    tokenizer = pretrained.read_tokenizer(finished.tokenizer_source)
    positions = getattr(pretrained.read_architecture(base), "max_position_embeddings", None) or 0
    base = base.model_copy(update={"max_length": max(base.max_length, positions)})  # on a GPU unsloth cuts off there
    model, _ = models.load(base, dtype, gradient_checkpointing="none", full=False, seed=0)
    if finished.adapter:
        model = adapters.put_on(model, finished.adapter)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # never looked at
    pretrained.check_tokens(tokenizer, len(model.get_input_embeddings().weight))
    models.for_inference(model)
    return model, tokenizer
