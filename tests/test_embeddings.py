"""Embeddings and head trained beside an adapter (lora.train_embeddings), of a tied and of an untied model."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import learned, losses, run, settings, whole_and_copy

from fasttune.bench.run import checked_arms
from fasttune.core import memory as memory_forecast, sharded
from fasttune.core.memory import Choices, Shape, Workload
from fasttune.errors import ConfigError, FasttuneError

pytestmark = pytest.mark.usefixtures("unsloth")

PROMPT = "What is 2 + 3?"
ENDS = ("model.embed_tokens", "lm_head")
PLAIN_LOGITS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
prompt, *folders = sys.argv[1:]
for folder in folders:
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        asked = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
        torch.save(model(**asked).logits, f"{folder}/logits.pt")
assert "unsloth" not in sys.modules
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model folders or names: the tiny model, and one whose head is its embedding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fasttune.core import pretrained

    folder, tiny = tmp_path_factory.mktemp("base") / "tied", pretrained.builtin("builtin:tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return {"untied": "builtin:tiny", "tied": str(folder)}


def changes(base: str, **train: Any) -> dict[str, Any]:
    held_out = {"data": {"eval": "builtin:arithmetic"}, "samples": 1}
    return {"model": {"name": base}, "lora": {"train_embeddings": True}, "train": train, **held_out}


@pytest.fixture(scope="module")
def runs(unsloth: None, bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder (with a copy after step 5 beside it) and live job of a run of each base."""
    from fasttune.core import train

    found, prepare = {}, train.prepare
    for kind, base in bases.items():
        jobs: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "prepare", lambda *a, jobs=jobs: jobs.append(prepare(*a)) or jobs[-1])
            folder = whole_and_copy(tmp_path_factory.mktemp(kind) / "run", 5, changes(base))
        found[kind] = (folder, jobs[0])
    return found


def logits(model: Any, tokenizer: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_plain_peft_and_a_merged_model_say_the_same(
    runs: dict[str, tuple[Path, Any]], bases: dict[str, str], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from fasttune.tools import merged_weights, trained_model

    adapters = [str(folder / "adapter") for folder, _ in runs.values()]
    subprocess.run([sys.executable, "-c", PLAIN_LOGITS, PROMPT, *adapters], check=True, capture_output=True)
    for kind, (folder, job) in runs.items():
        wanted = logits(job.model, job.tokenizer)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(torch.load(folder / "adapter" / "logits.pt", weights_only=True), wanted, **close)
        opened = trained_model.open_run(str(folder))
        torch.testing.assert_close(logits(*trained_model.load(opened, "float32")), wanted, **close)
        merged = tmp_path / kind
        merged.mkdir()
        plan = merged_weights.plan(opened.base, opened.adapter)
        merged_weights.write(plan, merged, None, lambda share: None)
        model = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(logits(model, job.tokenizer), wanted, **close)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is (kind == "tied")
        assert ("lm_head.weight" in load_file(merged / "model.safetensors")) is (kind == "untied")
        with job.model.disable_adapter():  # so the comparisons can fail: without what was trained beside the adapter
            assert (logits(job.model, job.tokenizer) - wanted).abs().max() > 1e-2
        base = AutoModelForCausalLM.from_pretrained(merged_weights.plan(opened.base, None).base)
        moved = (model.get_input_embeddings().weight - base.get_input_embeddings().weight).abs().max()
        assert 1e-3 < moved < 8.1e-3  # AdamW's steps are as long as the learning rate, here 1e-3 at most, eight times


def test_what_is_trained_and_how_fast_is_read_from_the_live_model(runs: dict[str, tuple[Path, Any]]) -> None:
    import json

    from fasttune.core import what_ran

    for kind, (folder, job) in runs.items():
        told = json.loads((folder / "run.json").read_text())
        one = ", which are one tensor" if kind == "tied" else ""
        assert told["backend"]["dtype"].startswith(f"float32 trained (adapter, embeddings and head{one}), ")
        assert {s["name"]: s["value"] for s in told["settings"]}["embeddings and head"].endswith("learning rate 0.001")
        trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad and "lora_" not in name}
        assert len(trained) == (1 if kind == "tied" else 2)
        adapter = sum(p.numel() for name, p in job.model.named_parameters() if "lora_" in name)
        shape = Shape.of(job.model.config)
        assert what_ran.count_flops(job.model) == shape.flops(False, adapter, head_trained=True)
        assert shape.trained_weights(job.config) == adapter + sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_resumed_run_is_the_same_to_the_bit(
    runs: dict[str, tuple[Path, Any]], bases: dict[str, str], kind: str
) -> None:
    whole = runs[kind][0]
    copy = whole.with_name("copy")
    shutil.rmtree(copy / "checkpoints" / "step-4")
    assert run(copy, changes(bases[kind]), resume=True).resumed_from_step == 2
    assert learned(copy) == learned(whole) and losses(copy) == losses(whole)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_above_bf16_weights_small_updates_are_not_lost(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on a GPU: bf16 base and autocast. Hardly a weight with a gradient (a fifth of the rows) is a bf16 value."""
    from safetensors.torch import load_file

    monkeypatch.setattr("unsloth_zoo.cpu.trainer.cpu_bf16_supported", lambda: True)
    slow = changes(bases[kind], embedding_learning_rate=1e-6, max_steps=2, scheduler="constant", warmup_ratio=0.0)
    slow["model"] |= {"dtype": "bfloat16"}
    result = run(tmp_path / "run", slow)
    assert result.status == "completed" and result.backend.packing.startswith("packed"), result.error
    assert result.backend.dtype.endswith("bfloat16 frozen, bf16 autocast")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for end in ENDS:
        weight = saved[f"base_model.model.{end}.weight"]
        assert (weight != weight.bfloat16().float()).float().mean() > 0.1, end
    if kind == "untied":  # the other way without autocast, as on a CPU that has no bf16
        monkeypatch.setattr("unsloth_zoo.cpu.trainer.cpu_bf16_supported", lambda: False)
        assert run(tmp_path / "emulated", slow).status == "completed"


def test_the_embeddings_have_groups_of_their_own(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune.core import trainer

    build, seen = trainer.build, []
    monkeypatch.setattr(trainer, "build", lambda *a, **k: seen.append(build(*a, **k)) or seen[-1])
    asked = {"scheduler": "cosine", "min_learning_rate": 1e-3, "embedding_learning_rate": 5e-3, "weight_decay": 0.1}
    run(tmp_path / "run", changes(bases["untied"], betas=[0.9, 0.95], max_steps=3, **asked))
    names = {id(p): name for name, p in seen[0].model.named_parameters()}
    rates = {}
    for group in filter(lambda group: group["params"], seen[0].optimizer.param_groups):
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.1)
        rates |= {names[id(p)]: group["initial_lr"] for p in group["params"]}
    assert rates == {name: 5e-3 if any(end in name for end in ENDS) else 1e-2 for name in rates} and len(rates) == 30
    first, *_, last = seen[0].lr_scheduler.get_last_lr()
    assert (first, last) == pytest.approx((1e-3, 5e-4))  # a tenth of each highest value, after the last step


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"train": {"embedding_learning_rate": 1e-5}}, "needs lora.train_embeddings=true: none are trained"),
        ({"train": {"embedding_learning_rate": 1e-5, "method": "full"}}, "all weights have one learning rate"),
        ({"lora": {"train_embeddings": True, "plus_ratio": 4}}, "lora.plus_ratio has learning rates of its own"),
        ({"lora": {"train_embeddings": True, "init": "olora"}}, "lora.init=olora is not for lora.train_embeddings"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, asked)
    assert told in str(caught.value)


def test_where_it_does_not_work_it_is_refused_by_name(tmp_path: Path) -> None:
    asked = settings(tmp_path, {"lora": {"train_embeddings": True}})
    with pytest.raises(FasttuneError, match="lora.train_embeddings=false"):
        sharded.check(asked)
    with pytest.raises(FasttuneError, match="add lora.train_embeddings=false"):
        checked_arms(asked, None, 5, None)


def test_the_forecast_counts_copies_gradients_and_moments(tmp_path: Path) -> None:
    """By arithmetic, of Llama 3.1 8B on a card: fp32 copies beside the frozen bf16 ones, and autocast's of the head."""
    shape = Shape(32, 4096, 14336, 32, 4096, 1024, 128256, tied=False)
    choices = Choices(80, "lora", "bfloat16", "unsloth", "adamw_torch_fused", packed=True, parts=1)
    plain, asked = (settings(tmp_path, {"lora": {"train_embeddings": ends}}) for ends in (False, True))
    without, found = (
        memory_forecast.forecast(each, shape, choices, Workload.full(1, 512, True)) for each in (plain, asked)
    )
    ends = 128256 * 4096 / 2**30
    assert found.adapter - without.adapter == found.gradients - without.gradients == pytest.approx(4 * 2 * ends)
    assert found.optimizer - without.optimizer == pytest.approx(8 * 2 * ends)
    assert found.weights - without.weights == pytest.approx(2 * ends)
