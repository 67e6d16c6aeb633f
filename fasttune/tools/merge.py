"""Adapter + base → the files of one model, shard by shard: never more than one shard in memory.

W + scale · B A in fp32, then cast. PEFT says which layers carry an adapter and at which scale; it is asked on a model
without weights (meta device). Source: https://arxiv.org/abs/2106.09685, section 4.1.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttune import hub, paths
from fasttune.config import ModelConfig
from fasttune.core import pretrained
from fasttune.errors import ModelError
from fasttune.tools import adapter as adapters
from fasttune.tools.adapter import PREFIX, Shapes

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
BESIDE = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")  # kept of the base
CODE = "*.py"  # too, where the command trusts it: a converter to GGUF runs what it finds
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's registrations warn at every import


@dataclass(frozen=True)
class Delta:
    """What one weight gains: scale · B A, transposed where the layer keeps its weight as (in, out)."""

    a: str  # names in the adapter's file; A (r, in), B (out, r)
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Merge:
    """What goes where: shard files of the base, the weights that change, and those that an adapter brings whole."""

    base: Path
    adapter: Path | None
    shards: dict[str, list[str]]  # file name → its tensors
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)  # weight → name in the adapter's file
    trusted: bool = False  # the code that comes with the base
    rows: int | None = None  # of the embeddings, where the adapter brings more than the base has

    def size_bytes(self, dtype_bytes: int | None) -> int:
        """Of the files to write, at most: those of the base, each value in `dtype_bytes` where that is more."""
        read = sum((self.base / name).stat().st_size for name in self.shards)
        return read if dtype_bytes is None else read * max(1, dtype_bytes // 2)


def plan(base: ModelConfig, adapter: Path | None) -> Merge:
    """Everything that is checked before a byte is written. Raises ModelError for what cannot be merged exactly."""
    pretrained.read_architecture(base)  # says what is wrong with it
    folder = _files(base)
    for place in filter(None, (folder, adapter)):
        paths.check_model(place, weights_too=True)
    if pretrained.read_json(folder / "config.json").get("quantization_config"):
        raise ModelError(
            f"{base.name}: these weights are quantized, so nothing can be added to them exactly; merge into the 16-bit "
            "model they were made from: put its name into model.name of config.yaml"
        )
    shards = _shards(folder, base.name)
    if adapter is None:
        return Merge(folder, None, shards, trusted=base.trust_remote_code)
    names = {name for names in shards.values() for name in names}
    deltas, replaced, rows = _adapter(base, folder, adapter, names)
    return Merge(folder, adapter, shards, deltas, replaced, base.trust_remote_code, rows)


def _files(base: ModelConfig) -> Path:
    """The base's folder; of a hub id the cached one, filled first where the hub can be reached."""
    source = pretrained.locate(base)
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", *BESIDE, CODE]
    try:
        found = hub.patiently(
            lambda: huggingface_hub.snapshot_download(
                source, revision=base.revision, allow_patterns=wanted, ignore_patterns=["original/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise pretrained.explain(base.name, error) from error
    return Path(found)


def _shards(folder: Path, name: str) -> dict[str, list[str]]:
    import safetensors

    if (folder / INDEX).is_file():
        named = pretrained.read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise ModelError(f"{folder / INDEX}: has no weight_map from weights to files; get the model again")
        files = sorted(set(named.values()))
    else:
        files = [WEIGHTS]
    found = {}
    for file in files:
        if Path(file).name != file:  # it is a name to write by as well
            raise ModelError(f"{name}: {INDEX} names the file {file}, which is not beside it; get the model again")
        if not (folder / file).is_file():
            raise ModelError(
                f"{name}: has no {file}: only safetensors weights can be merged; load and save it so first"
            )
        try:
            with safetensors.safe_open(folder / file, "pt") as shard:
                found[file] = list(shard.keys())
        except safetensors.SafetensorError as error:
            raise ModelError(f"{name}: {file} is damaged ({error}); get it again") from error
    return found


def _adapter(
    base: ModelConfig, folder: Path, adapter: Path, weights: set[str]
) -> tuple[dict[str, Delta], dict[str, str], int | None]:
    """(what each weight gains, what is replaced whole, Merge.rows), as PEFT says on a model without weights."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, names, shapes, sizes, rows = _without_weights(base, folder, adapter)
    left = set(shapes)
    deltas, cannot = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        weight = name.removeprefix(PREFIX)
        mine = {key for key in left if key.startswith(f"{name}.lora_")}
        plain = type(module) is Linear and mine == {a, b}
        if not plain or weight in names or f"{weight}.weight" not in weights:
            why = f"{type(module).__name__} with {', '.join(sorted(k.removeprefix(f'{name}.') for k in mine))}"
            why = "tied to the other end of the model" if plain and weight in names else why
            cannot.append(f"{weight} ({why})")
            continue
        left -= mine
        deltas[f"{weight}.weight"] = Delta(a, b, float(module.scaling["default"]), bool(module.fan_in_fan_out))
    left = {name for name in left if adapters.copy_of(name) not in left}
    replaced = _whole(adapter, left, names, weights, cannot)
    for name, key in replaced.items():
        if shapes[key] != sizes.get(name, shapes[key]):
            cannot.append(f"{name} ({shapes[key]}, in the base {sizes[name]})")
    if cannot:
        more = f" and {len(cannot) - 3} more" if len(cannot) > 3 else ""
        raise ModelError(
            f"{adapter}: cannot be merged exactly: {'; '.join(cannot[:3])}{more}; use it with PEFT instead"
        )
    return deltas, replaced, rows


def _without_weights(
    base: ModelConfig, folder: Path, adapter: Path
) -> tuple[Any, list[str], Shapes, Shapes, int | None]:
    """PEFT's model on the meta device, its tied modules, what the adapter and the base hold, Merge.rows.

    Raises ModelError where the adapter is not of this base.
    """
    import peft
    import torch
    import transformers

    pretrained.read_architecture(base)  # refuses what cannot be built
    with pretrained.explained(base.name), torch.device("meta"):
        architecture = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=base.trust_remote_code)
        model = transformers.AutoModelForCausalLM.from_config(architecture, trust_remote_code=base.trust_remote_code)
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        tied = ends[1] is not None and ends[0].weight is ends[1].weight
        names = [name for name, module in model.named_modules() if module in ends] if tied else []
    shapes = adapters.check(model, adapter)
    with adapters.explained(adapter), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights: they are refused later
        rows = adapters.grow(model, shapes, adapter)
        sizes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        said = peft.PeftConfig.from_pretrained(str(adapter))
        said.init_lora_weights = False  # nothing is computed, there are no weights
        model = peft.get_peft_model(model, said)
        wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    known = {*wanted, *(name.replace(".default", "") for name in model.state_dict())}
    adapters.check_names(adapter, shapes, sorted(set(wanted) - set(shapes)), sorted(set(shapes) - known))
    for name, weight in wanted.items():
        if shapes[name] != tuple(weight.shape):
            raise ModelError(f"{adapter}: {name} is {shapes[name]}, for this base it would be {tuple(weight.shape)}")
    return model, names, shapes, sizes, rows


def _whole(adapter: Path, keys: set[str], tied: list[str], weights: set[str], cannot: list[str]) -> dict[str, str]:
    """Weights that an adapter brings whole (modules_to_save, grown embeddings); what fits nowhere goes to `cannot`."""
    import safetensors

    found = {key.removeprefix(PREFIX): key for key in sorted(keys)}
    ends = [f"{name}.weight" for name in tied if f"{name}.weight" in found]
    if ends:
        with safetensors.safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            both = [file.get_tensor(found[name]) for name in ends]
        if len(both) < 2 or not both[0].equal(both[1]):
            cannot.append(f"{ends[0]} (tied in the base, not in the adapter)")
        else:
            for name in [name for name in ends if name not in weights]:
                del found[name]
    cannot += [f"{name} (no such weight in the base)" for name in found if name not in weights]
    return found


def write(merge: Merge, folder: Path, dtype: str | None, progress: Callable[[float], None]) -> None:
    """The merged model's weights and config into an empty folder; `dtype` None keeps that of each tensor.

    Raises ModelError where a value does not fit the dtype.
    """
    import safetensors
    import safetensors.torch

    total = 0
    for number, (file, names) in enumerate(merge.shards.items()):
        progress(number / len(merge.shards))
        with safetensors.safe_open(merge.base / file, "pt") as shard:
            made = {name: _merged(merge, name, shard.get_tensor(name), dtype) for name in names}
            safetensors.torch.save_file(made, folder / file, metadata=shard.metadata() or {"format": "pt"})
        total += sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        del made
    for pattern in (*BESIDE, CODE) if merge.trusted else BESIDE:
        for path in merge.base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    if (merge.base / INDEX).is_file():
        index = json.loads((merge.base / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not merge.trusted:
        config.pop("auto_map", None)  # names code that is not there
    if dtype:
        config = {**{key: value for key, value in config.items() if key != "torch_dtype"}, "dtype": dtype}
    if merge.rows:
        config["vocab_size"] = merge.rows
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    paths.readable(folder)
    progress(1.0)


def _merged(merge: Merge, name: str, weight: Any, dtype: str | None) -> Any:
    """One tensor as it is written: summed in fp32, then cast."""
    import torch

    wanted = getattr(torch, dtype) if dtype and weight.is_floating_point() else weight.dtype
    delta = merge.deltas.get(name)
    if delta:
        product = _of_adapter(merge, delta.b).float() @ _of_adapter(merge, delta.a).float()  # (out, in)
        product = product.T if delta.transposed else product
        if product.shape != weight.shape:
            raise ModelError(f"{merge.adapter}: {name} is {tuple(weight.shape)}, not {tuple(product.shape)}")
        made = product.mul_(delta.scale).add_(weight).to(wanted)
    else:
        made = (_of_adapter(merge, merge.replaced[name]) if name in merge.replaced else weight).to(wanted)
    if made.is_floating_point() and (delta or wanted == torch.float16) and not made.abs().max().isfinite():
        raise ModelError(f"{name}: has values that {wanted} cannot hold; merge with --dtype bf16")
    return made.contiguous()


def _of_adapter(merge: Merge, name: str) -> Any:
    import safetensors

    with safetensors.safe_open(Path(str(merge.adapter)) / "adapter_model.safetensors", "pt") as file:
        return file.get_tensor(name)
