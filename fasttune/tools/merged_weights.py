"""Adapter + base → the files of one model, shard by shard: never more than one shard in memory.

W + scale · B A in fp32, then cast. PEFT says which layers carry an adapter and at which scale; it is asked on a model
without weights (meta device). Source: https://arxiv.org/abs/2106.09685, section 4.1.

Not PEFT's merge_and_unload: it rounds as we do, but holds all weights at once, and transformers would save them: in one
dtype, without a tensor that it does not know, under a config.json of its own version.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors

from fasttune import system
from fasttune.core import model_files, pretrained
from fasttune.errors import ModelError, in_one_line
from fasttune.settings import ModelConfig
from fasttune.tools import trained_model
from fasttune.tools.trained_model import PREFIX

INDEX = "model.safetensors.index.json"
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
    trusted: bool  # the code that comes with the base
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)  # weight → name in the adapter's file
    rows: int | None = None  # of the embeddings, where the adapter brings more than the base has

    def gib(self, dtype: str | None) -> float:
        """Of the files to write, at most: those of the base, which may hold values of half the size."""
        read = sum((self.base / name).stat().st_size for name in self.shards) / 2**30
        return 2 * read if dtype == "float32" else read


def plan(base: ModelConfig, adapter: Path | None) -> Merge:
    """Everything that is checked before a byte is written. Raises ModelError for what cannot be merged exactly."""
    pretrained.read_architecture(base)  # says what is wrong with it
    folder = _files(base)
    for place in filter(None, (folder, adapter)):
        model_files.check_folder(place, weights_too=True)
    if model_files.read_json(folder / "config.json").get("quantization_config"):
        raise ModelError(
            f"{base.name}: these weights are quantized, so nothing can be added to them exactly; merge into the 16-bit "
            "model they were made from: put its name into model.name of config.yaml"
        )
    merge = Merge(folder, adapter, _shards(folder, base.name), base.trust_remote_code)
    return merge if adapter is None else _with_adapter(merge, adapter, base.name)


def _files(base: ModelConfig) -> Path:
    """The base's folder; of a hub id the cached one, filled first where the hub can be reached."""
    source = pretrained.locate(base)
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub

    patterns = {"allow_patterns": ["*.json", "*.safetensors", *BESIDE, CODE], "ignore_patterns": ["original/*"]}
    with pretrained.explained(base.name):
        return Path(huggingface_hub.snapshot_download(source, revision=base.revision, **patterns))


def _shards(folder: Path, name: str) -> dict[str, list[str]]:
    files = ["model.safetensors"]
    if (folder / INDEX).is_file():
        named = model_files.read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise ModelError(f"{folder / INDEX}: has no weight_map from weights to files; get the model again")
        files = sorted(set(named.values()))
    found = {}
    for file in files:
        if Path(file).name != file:  # it is a name to write by as well
            raise ModelError(f"{name}: {INDEX} names the file {file}, which is not beside it; get the model again")
        if not (folder / file).is_file():
            raise ModelError(
                f"{name}: has no {file}: only safetensors weights can be merged; load and save it so first"
            )
        with (
            in_one_line(ModelError, f"{name}: {file} is damaged", "get it again", (safetensors.SafetensorError,)),
            safetensors.safe_open(folder / file, "pt") as shard,
        ):
            found[file] = list(shard.keys())
    return found


def _with_adapter(merge: Merge, adapter: Path, base: str) -> Merge:
    """What each weight gains and what is replaced whole, as PEFT says on a model without weights."""
    import torch
    import transformers
    from peft.tuners.lora import Linear

    with pretrained.explained(base), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights: those are refused below
        trust = {"trust_remote_code": merge.trusted}
        architecture = transformers.AutoConfig.from_pretrained(merge.base, **trust)
        model = transformers.AutoModelForCausalLM.from_config(architecture, **trust)
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        one = ends[1] is not None and ends[0].weight is ends[1].weight
        tied = {f"{name}.weight" for name, module in model.named_modules() if one and module in ends}
        model, shapes, rows = trained_model.put_on(model, adapter)
    weights = {name for names in merge.shards.values() for name in names}
    deltas = {}
    for name, module in model.named_modules():
        weight, a, b = f"{name.removeprefix(PREFIX)}.weight", f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        plain = type(module) is Linear and {key for key in shapes if key.startswith(f"{name}.lora_")} == {a, b}
        if plain and weight in weights - tied:
            deltas[weight] = Delta(a, b, float(module.scaling["default"]), bool(module.fan_in_fan_out))
    used = {key for delta in deltas.values() for key in (delta.a, delta.b)}
    left = {key.removeprefix(PREFIX): key for key in sorted(shapes) if trained_model.copied(key) not in shapes}
    whole = {name: key for name, key in left.items() if key not in used and name in weights | tied}
    both = [_read(adapter, key) for name, key in whole.items() if name in tied]
    if both and not (len(both) == 2 and both[0].equal(both[1])):  # not the same at both ends of the model
        whole = {name: key for name, key in whole.items() if name not in tied}
    if cannot := [name for name, key in left.items() if key not in used and name not in whole]:
        more = f" and {len(cannot) - 3} more" if len(cannot) > 3 else ""
        raise ModelError(
            f"{adapter}: cannot be merged exactly: {', '.join(cannot[:3])}{more}; only plain LoRA of linear layers "
            "that are not tied to another, and whole weights, can; use it with PEFT instead"
        )
    replaced = {name: key for name, key in whole.items() if name in weights}
    return replace(merge, deltas=deltas, replaced=replaced, rows=rows)


def write(merge: Merge, folder: Path, dtype: str | None, progress: Callable[[float], None]) -> None:
    """The merged model's weights and config into an empty folder; `dtype` None keeps that of each tensor.

    Raises ModelError where a value does not fit the dtype.
    """
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
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if merge.rows:
        config["vocab_size"] = merge.rows
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    system.make_readable(folder)
    progress(1.0)


def _merged(merge: Merge, name: str, weight: Any, dtype: str | None) -> Any:
    """One tensor as it is written: summed in fp32, then cast."""
    import torch

    adapter = merge.adapter or Path()
    wanted = getattr(torch, dtype) if dtype and weight.is_floating_point() else weight.dtype
    delta = merge.deltas.get(name)
    if delta:
        product = _read(adapter, delta.b).float() @ _read(adapter, delta.a).float()  # (out, in)
        product = product.T if delta.transposed else product
        if product.shape != weight.shape:
            raise ModelError(f"{adapter}: {name} is {tuple(weight.shape)}, not {tuple(product.shape)}")
        made = product.mul_(delta.scale).add_(weight).to(wanted)
    else:
        made = (_read(adapter, merge.replaced[name]) if name in merge.replaced else weight).to(wanted)
    if made.is_floating_point() and (delta or wanted == torch.float16) and not made.abs().max().isfinite():
        if delta and not product.abs().max().isfinite():
            raise ModelError(f"{adapter}: its weights for {name} are not finite (NaN or infinity); train it again")
        raise ModelError(f"{name}: has values that {wanted} cannot hold; merge with --dtype bf16")
    return made.contiguous()


def _read(adapter: Path, name: str) -> Any:
    with safetensors.safe_open(adapter / trained_model.WEIGHTS, "pt") as file:
        return file.get_tensor(name)
