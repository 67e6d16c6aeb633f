"""A model that is there to be used: a finished run, a model or adapter folder, a built-in model or a hub id.

trained = open_run("runs/quickstart-20261121-120000")      # reads two small files
model, tokenizer = load(trained, dtype_for(trained))       # base weights, and the adapter on them

An adapter may come from anywhere: what PEFT would run, build or search by its word alone is bounded first.
"""

import shlex
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from fasttune import config as configuration, hints
from fasttune.config import Config
from fasttune.core import model_files, pretrained
from fasttune.errors import ConfigError, ModelError, in_one_line
from fasttune.settings import ModelConfig, looks_like_hub

Dtype = Literal["bfloat16", "float32"]
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before every name of the base model
COPIES = (".modules_to_save.", ".original_module.")  # PEFT sometimes writes these too, beside the weight itself
# They would rebuild the base, or import a module by its name.
REFUSED = ("layer_replication", "megatron_config", "loftq_config", "arrow_config")
LONGEST = 2**24  # tokens: as model.max_length allows
MATCHING_CPU_S = 2.0  # of all patterns against all layers; ordinary ones take milliseconds

Shape = tuple[int, ...]
Amount = Annotated[float, pydantic.Field(strict=True, gt=0, lt=1e9)]  # a rank or an alpha


@dataclass(frozen=True)
class TrainedModel:
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
        if self.adapter is None or not (self.adapter / "tokenizer_config.json").is_file():
            return self.base
        return ModelConfig(name=str(self.adapter), trust_remote_code=self.base.trust_remote_code)

    def reading(self, source: str) -> tuple[str, dict[str, str]]:
        """(split, data.columns) of the run for rows that its config names; ("train", {}) for all others."""
        data = self.config.data if self.config else None
        if data is None or source not in (data.eval, *data.sources):
            return "train", {}
        return data.held_out_split if source == data.eval else data.split, data.columns


def open_run(name: str, trust_remote_code: bool = False) -> TrainedModel:
    """The parts of RUN (output folder of `fasttune train`) or MODEL (folder, `builtin:` name, hub id).

    Only the command now given may switch on the model's own code, never a file that is there. Imports nothing heavy and
    loads no weights. Raises ModelError in one line.
    """
    folder = Path(name).expanduser()
    if folder.name in ("adapter", "model") and (folder.parent / "config.yaml").is_file() and folder.is_dir():
        folder = folder.parent
    if name.startswith("builtin:"):
        pretrained.check_name(name)
    elif not folder.is_dir():
        _refuse_missing(name, folder)
    elif (folder / "config.yaml").is_file():
        return _run(name, folder, trust_remote_code)
    elif (folder / SETTINGS).is_file():
        return _adapter(name, folder, trust_remote_code)
    elif not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: holds no run (config.yaml), no adapter ({SETTINGS}) and no model (config.json); name the output "
            "folder of `fasttune train`, or a model"
        )
    name_of_base = str(folder) if folder.is_dir() else name
    return TrainedModel(name, ModelConfig(name=name_of_base, trust_remote_code=trust_remote_code))


def _refuse_missing(name: str, folder: Path) -> None:
    """runs/NAME also looks like a hub id: where the folder runs is here, a run is meant."""
    if folder.exists() or not looks_like_hub(name):
        raise ModelError(f"{name}: no such folder; name a run (runs/NAME-DATE), a model folder or a hub id")
    if folder.parent.is_dir():
        runs = sorted(folder.parent.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
        newest = ", ".join(str(path.parent) for path in runs[:3])
        there = f"the newest there: {newest}" if newest else "there is none; for a hub id go to another folder"
        raise ModelError(f"{name}: no such run in {folder.parent}/; {there}")


def _run(name: str, folder: Path, trust: bool) -> TrainedModel:
    try:
        config = configuration.load(folder / "config.yaml", [f"{configuration.TRUST}=false"])
    except ConfigError as error:
        raise ModelError(f"{name}: its config.yaml cannot be used: {error.problems[0]}") from error
    result = model_files.read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    status = result.get("status", "running")
    status = "not finished" if status == "running" else status  # or it was killed
    full = config.train.method == "full"
    weights = folder / ("model" if full else "adapter")
    if not weights.is_dir():
        resume = f"fasttune train --resume {shlex.quote(str(folder))}"
        raise ModelError(f"{name}: this run is {status} and has no {weights.name}/; resume it: {resume}")
    model_files.check_folder(weights)
    own: dict[str, Any] = {"trust_remote_code": trust, "added_tokens": []}  # what is saved has them
    base = own | ({"name": str(weights), "revision": None} if full else {})
    if not full:
        adapter_settings(weights)
    unfinished = f"{name}: this run is {status}, so the weights in {weights.name}/ may not be its last ones"
    warnings = [] if status == "completed" else [unfinished]
    model = configuration.changed(config, model=base).model
    return TrainedModel(name, model, None if full else weights, folder, config, result or None, warnings)


def _adapter(name: str, folder: Path, trust: bool) -> TrainedModel:
    """A PEFT folder that is no part of a run: it names its base itself."""
    model_files.check_folder(folder)
    said = adapter_settings(folder)
    base, where = said.base_model_name_or_path, f"{folder / SETTINGS}: base_model_name_or_path"
    if not base:
        raise ModelError(f"{where} is empty; set it to the folder or hub id of the base model")
    if model_files.is_path(base) and model_files.folder_of(base) is None:
        raise ModelError(f"{where} is {base[:100]}, which is not here; set it to the folder or hub id of that model")
    pretrained.check_name(base)
    return TrainedModel(name, ModelConfig(name=base, revision=said.revision, trust_remote_code=trust), folder)


class AdapterSettings(pydantic.BaseModel):
    """What must hold of an adapter_config.json, whoever wrote it."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Amount = 8
    lora_alpha: Amount = 8
    rank_pattern: dict[str, Amount] | None = None
    alpha_pattern: dict[str, Amount] | None = None
    # Those without a loop of a length that the file names.
    init_lora_weights: Literal[None, True, False, "gaussian", "pissa", "olora", "orthogonal", "eva", "corda"] = True

    @property
    def rank(self) -> float:
        return max([self.r, *(self.rank_pattern or {}).values()])


def adapter_settings(folder: Path) -> AdapterSettings:
    """Of a LoRA adapter whose weights are safetensors. Raises ModelError for any other folder."""
    found = model_files.read_json(folder / SETTINGS)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise model_files.pickled(str(folder), "adapter_model.bin")
        raise ModelError(f"{folder}: has no {WEIGHTS}; copy the whole folder, or name another adapter")
    if used := [name for name in REFUSED if found.get(name)]:
        raise ModelError(
            f"{folder / SETTINGS}: {used[0]} is not supported; merge the adapter where it was made, and name the model"
        )
    try:
        return AdapterSettings.model_validate({"peft_type": None, **found})
    except pydantic.ValidationError as error:
        problem = hints.in_words(error.errors(include_url=False), [])[0]
        raise ModelError(f"{folder / SETTINGS}: {problem}; save it as a plain LoRA adapter") from error


def dtype_for(trained: TrainedModel) -> Dtype:
    """As it was trained where there is a GPU, bfloat16 for other models; float32 on a CPU. Imports torch."""
    from fasttune.core import model as models

    if not models.torch.cuda.is_available():
        return "float32"
    dtype = trained.config.model.dtype if trained.config else "auto"
    return "bfloat16" if dtype == "auto" else dtype


def load(trained: TrainedModel, dtype: Dtype) -> tuple[Any, Any]:
    """(model ready to generate, tokenizer with the chat template of the training). Raises ModelError.

    The base is quantized as it was in training; where there is no GPU for that, `trained.warnings` says so.
    """
    from fasttune.core import model as models

    base = trained.base.model_dump(exclude_unset=True)
    if trained.base.quantization == "nf4" and not models.torch.cuda.is_available():
        trained.warnings.append("trained on nf4 weights, which need a GPU: used here on the unquantized base")
        base["quantization"] = "none"
    tokenizer = pretrained.read_tokenizer(trained.tokenizer_source)
    positions = getattr(pretrained.read_architecture(trained.base), "max_position_embeddings", None) or 0
    base["max_length"] = max(trained.base.max_length, min(positions, LONGEST))  # on a GPU unsloth cuts off there
    model, _ = models.load(ModelConfig(**base), dtype, gradient_checkpointing="none", full=False, seed=0)
    if folder := trained.adapter:
        model = put_on(model, folder)[0]
        with _peft_in_one_line(folder):
            model.load_adapter(str(folder), "default")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # never looked at
    pretrained.check_tokens(tokenizer, len(model.get_input_embeddings().weight))
    models.for_inference(model)
    return model, tokenizer


def put_on(model: Any, folder: Path) -> tuple[Any, dict[str, Shape], int | None]:
    """An adapter's layers on a base, loaded or without weights (meta device), as PEFT makes them: still empty.

    Returns PEFT's model, the shapes of the weights in the adapter's file, and how many embeddings the base has grown
    to, where the adapter brings more. Raises ModelError where not every weight of the adapter finds its layer, or not
    every layer its weight.
    """
    import peft

    shapes = _weight_shapes(folder)
    with _peft_in_one_line(folder):
        config = peft.PeftConfig.from_pretrained(str(folder))
        _match_patterns(model, config, folder)
        rows = _grow(model, shapes, folder)
        config.inference_mode = True
        if model.device.type == "meta":
            config.init_lora_weights = False  # nothing can be computed there
        made = peft.PeftModelForCausalLM(model, config)
        wanted = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    parameters = made.named_parameters(remove_duplicate=False)
    known = {name.replace(".default", ""): value for name, value in parameters} | wanted
    lacking = sorted(set(wanted) - set(shapes))
    unused = sorted(name for name in set(shapes) - set(known) if copied(name) not in shapes)
    if unused:
        told = f"{len(unused)} of the adapter's {len(shapes)} weights have no layer in the base, e.g. {unused[0]}"
        fix = "name them as PEFT does, base_model.model.…, or set base_model_name_or_path to its own base"
        raise ModelError(f"{folder}: {told}; {fix}")
    if lacking:
        told = f"the adapter has no weights for {len(lacking)} of those its settings name, e.g. {lacking[0]}"
        raise ModelError(f"{folder}: {told}; get it again whole, or set base_model_name_or_path to its own base")
    for name, shape in shapes.items():
        if name in known and shape != (size := tuple(known[name].shape)):
            raise ModelError(f"{folder}: {name} is {shape}, for this base it would be {size}; it has another base")
    return made, shapes, rows


def copied(name: str) -> str | None:
    """The weight that one of COPIES is of."""
    return next((name.replace(kind, ".") for kind in COPIES if kind in name), None)


def _peft_in_one_line(folder: Path) -> AbstractContextManager[None]:
    what = f"{folder}: does not fit its base model, or is damaged"
    return in_one_line(ModelError, what, "set base_model_name_or_path to its own base, or get it again")


def _weight_shapes(folder: Path) -> dict[str, Shape]:
    """By name. Raises ModelError for a rank that is not that of the weights: PEFT would make matrices of it."""
    import safetensors

    said = adapter_settings(folder)
    with (
        in_one_line(ModelError, f"{folder / WEIGHTS}: cannot be read", "get it again"),
        safetensors.safe_open(folder / WEIGHTS, "pt") as file,
    ):
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    ranks = [shape[0] for name, shape in shapes.items() if ".lora_" in name and "_A" in name and shape]
    if said.rank > (largest := max(ranks, default=0)):
        raise ModelError(
            f"{folder / SETTINGS}: says rank {said.rank:,.0f}, its weights have at most {largest}; get both again"
        )
    return shapes


def _grow(model: Any, shapes: dict[str, Shape], folder: Path) -> int | None:
    """Give the base as many embeddings as the adapter brings: how many, or None where it has as many already."""
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [name for name, module in model.named_modules() if module is inside or module is outside]
    keys = [f"{PREFIX}{name}{kind}" for name in ends for kind in (".weight", ".base_layer.weight")]
    brought, now = [shapes[key] for key in keys if key in shapes], tuple(inside.weight.shape)
    if set(brought) <= {now}:
        return None
    first, tied = brought[0], outside is None or outside.weight is inside.weight
    whole = tied or len(brought) == len(ends)
    if set(brought) != {first} or first[1:] != now[1:] or not first[0] or not whole:
        sizes = f"its embeddings are {str(brought)[:120]}, those of the base {now}"
        raise ModelError(f"{folder}: {sizes}: it has another base, or lacks the other end of the model; get it again")
    model.resize_token_embeddings(first[0], mean_resizing=False)
    return first[0]


def _match_patterns(model: Any, config: Any, folder: Path) -> None:
    """Let PEFT match its patterns with every layer once, for a bounded time: some would take for ever."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    with _cpu_limit(f"{folder / SETTINGS}: its patterns (target_modules, …) take too long; name the layers instead"):
        for name, _ in model.named_modules():
            check_target_module_exists(config, name)
            for patterns in (config.rank_pattern, config.alpha_pattern):
                get_pattern_key((patterns or {}).keys(), name)


@contextmanager
def _cpu_limit(told: str) -> Iterator[None]:
    """ModelError after MATCHING_CPU_S seconds of this process's own time. Python's `re` looks for signals."""

    def stop(*_: Any) -> None:
        raise ModelError(told)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MATCHING_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
