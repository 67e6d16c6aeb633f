"""Merged weights are PEFT's, to the last file: shard by shard, refused where not exact."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fasttune.errors import ModelError
from fasttune.settings import ModelConfig
from fasttune.tools import merge_check, merged_weights, trained_model

pytestmark = pytest.mark.usefixtures("unsloth")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"up_proj": 3},
    },
    "pissa": {"target_modules": ALL, "init_lora_weights": "pissa"},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def base_model(folder: Path, **changes: Any) -> Path:
    """A random Llama with tokenizer in many small shards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fasttune.core import pretrained

    tiny = pretrained.builtin("builtin:tiny")
    architecture = AutoConfig.from_pretrained(tiny, **changes)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, grow: int = 0, **settings: Any) -> Path:
    """An adapter of noise on that base, as fasttune saves it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fasttune.core import model as models
    from fasttune.settings import LoraConfig

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if grow:
        tokenizer.add_tokens([f"<new{i}>" for i in range(grow)])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is tried here on purpose
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    pissa = settings.get("init_lora_weights") == "pissa"
    start = models.save_initial(model, LoraConfig(init="pissa"), folder.with_name("start")) if pissa else None
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.save(model, tokenizer, folder, start)
    return folder


def merged(base: Path, adapter: Path, out: Path, dtype: str | None = None) -> Path:
    out.mkdir()
    merged_weights.write(merged_weights.plan(ModelConfig(name=str(base)), adapter), out, dtype, lambda share: None)
    return out


def tensors(folder: Path) -> dict[str, Any]:
    import safetensors.torch

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_pefts(tmp_path: Path, variant: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_model(tmp_path / "base")
    learned = adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    found = tensors(merged(base, learned, tmp_path / "merged"))
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), learned).merge_and_unload()
    wanted, before = by_peft.state_dict(), tensors(base)
    assert found.keys() == wanted.keys() == before.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
    changed = {name for name in found if not found[name].equal(before[name])}
    targets = VARIANTS[variant]["target_modules"]
    assert changed == {n for n in found if n.split(".")[-2] in targets or (variant == "head" and "lm_head" in n)}


def test_layers_that_keep_their_weight_as_in_out(tmp_path: Path) -> None:
    """GPT-2's Conv1D: PEFT says fan_in_fan_out. The base is one file, its embeddings are tied."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    from fasttune.core import pretrained

    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2)).save_pretrained(base)
    AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny")).save_pretrained(base)
    learned = adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    found = tensors(merged(base, learned, tmp_path / "merged"))
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), learned).merge_and_unload()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(found[name], by_peft.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert found.keys() == tensors(base).keys() and "lm_head.weight" not in found
    assert not found[name].equal(tensors(base)[name])


def test_bf16_is_the_fp32_sum_rounded_once_in_the_same_files(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = base_model(tmp_path / "base", tie_word_embeddings=True)
    learned = adapter(base, tmp_path / "adapter", target_modules=ALL)
    exact = tensors(merged(base, learned, tmp_path / "fp32"))
    out = merged(base, learned, tmp_path / "bf16", "bfloat16")
    assert all(tensor.equal(exact[name].to(torch.bfloat16)) for name, tensor in tensors(out).items())
    assert len(list(out.glob("*.safetensors"))) > 3
    assert {path.name for path in out.iterdir()} == {
        path.name for path in base.iterdir() if path.name.startswith(("model", "config", "generation"))
    }
    index, old = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (out, base))
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"] // 2
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("tie", "settings"),
    [(True, {}), (False, {}), (False, {"modules_to_save": ["embed_tokens", "lm_head"]})],
)
def test_added_tokens_and_their_embeddings_are_kept(tmp_path: Path, tie: bool, settings: dict[str, Any]) -> None:
    """By merge and by what generate and eval load; PEFT writes modules_to_save after a resize three times."""
    import torch
    from transformers import AutoModelForCausalLM

    base = base_model(tmp_path / "base", tie_word_embeddings=tie)
    learned = adapter(base, tmp_path / "adapter", grow=3, target_modules=ALL, **settings)
    out = merged(base, learned, tmp_path / "merged")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 259 + 3
    shutil.copy(learned / "tokenizer.json", out)
    shutil.copy(learned / "tokenizer_config.json", out)
    compared = merge_check.compare(str(out), str(base), None, str(learned), False)
    assert compared.verified and compared.seen
    assert ("lm_head.weight" in tensors(out)) is not tie
    used, _ = trained_model.load(trained_model.open_run(str(learned)), "float32")
    ids = torch.tensor([[5, 259, 261]])
    torch.testing.assert_close(used(ids).logits, AutoModelForCausalLM.from_pretrained(out)(ids).logits)


@pytest.mark.parametrize(
    ("changes", "settings", "told"),
    [
        ({}, {"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({}, {"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({}, {"target_modules": ["q_proj"], "lora_bias": True}, "lora_B.bias"),
        ({"tie_word_embeddings": True}, {"target_modules": ["lm_head"]}, "lm_head.lora_A.weight"),
        (
            {"tie_word_embeddings": True},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "lm_head.weight",
        ),
    ],
)
def test_what_cannot_be_merged_exactly_is_named(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    base = base_model(tmp_path / "base", **changes)
    learned = adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match="cannot be merged exactly") as error:
        merged_weights.plan(ModelConfig(name=str(base)), learned)
    assert told in str(error.value)


def test_other_bases_are_refused(tmp_path: Path, finished_run: Path) -> None:
    base = base_model(tmp_path / "base")
    learned = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    architecture = json.loads((base / "config.json").read_text())
    for changes, told in [({"quantization_config": {"bits": 4}}, "quantized"), ({"hidden_size": 32}, "")]:
        (base / "config.json").write_text(json.dumps(architecture | changes))
        if told:
            with pytest.raises(ModelError, match=told):
                merged_weights.plan(ModelConfig(name=str(base)), learned)
    (base / "config.json").write_text(json.dumps(architecture))
    index = base / "model.safetensors.index.json"
    told, outside = json.loads(index.read_text()), tmp_path / "x.safetensors"
    shutil.copy(next(base.glob("*.safetensors")), outside)
    for file in ("../x.safetensors", str(outside)):
        index.write_text(json.dumps(told | {"weight_map": told["weight_map"] | {"w": file}}))
        with pytest.raises(ModelError, match="is not beside it"):
            merged_weights.plan(ModelConfig(name=str(base)), learned)
    index.write_text(json.dumps(told))
    next(base.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="only safetensors"):
        merged_weights.plan(ModelConfig(name=str(base)), learned)
    with pytest.raises(ModelError, match="float16 cannot hold"):
        plan = merged_weights.plan(ModelConfig(name="builtin:tiny"), finished_run / "adapter")
        huge = {name: replace(delta, scale=1e9) for name, delta in plan.deltas.items()}
        (tmp_path / "out").mkdir()
        merged_weights.write(replace(plan, deltas=huge), tmp_path / "out", "float16", print)
    file = shutil.copytree(finished_run / "adapter", tmp_path / "nan") / "adapter_model.safetensors"
    safetensors.torch.save_file({k: w * math.nan for k, w in safetensors.torch.load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"its weights for model\.layers.* are not finite"):
        plan = merged_weights.plan(ModelConfig(name="builtin:tiny"), tmp_path / "nan")
        merged_weights.write(plan, tmp_path / "out", None, print)


@pytest.mark.parametrize("trusted", [True, False])
def test_the_code_of_a_base_goes_along_only_where_it_is_trusted(tmp_path: Path, trusted: bool) -> None:
    """A converter to GGUF may run what it finds."""
    base = base_model(tmp_path / "base")
    said = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "own.Own"}}
    (base / "config.json").write_text(json.dumps(said))
    (base / "own.py").write_text("from transformers import LlamaConfig as Own")
    (base / "LICENSE").touch()
    (tmp_path / "out").mkdir()
    planned = merged_weights.plan(ModelConfig(name=str(base)), None)
    merged_weights.write(replace(planned, trusted=trusted), tmp_path / "out", None, lambda share: None)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("own.py" in written) == trusted and "LICENSE" in written
    assert ("auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())) == trusted
