"""What `auto` means on which machine, and that every choice says why."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fasttune import chips, config
from fasttune.core import autoconfig, remedies
from fasttune.core.memory import Shape
from fasttune.data.batching import Batches
from fasttune.data.store import Rows
from fasttune.errors import ConfigError, ModelError
from fasttune.hardware import Gpu, Hardware
from fasttune.settings import SEVEN_PROJECTIONS

LLAMA_8B = Shape(
    layers=32, hidden=4096, mlp=14336, heads=32, query_width=4096, key_width=1024, vocab=128256, tied=False
)
FULL = {"method": "full"}
CPU = Hardware("linux", "x86_64", "2.36", "3.11.7", "cpu", cores=2, memory_gib=24, disk_free_gib=100)


def gpu(name: str, memory_gib: float, capability: tuple[int, int] = (9, 0)) -> Hardware:
    card = Gpu(name, capability, memory_gib)
    return Hardware("linux", "x86_64", "2.36", "3.12.3", "cpu", 16, 128, 100, gpus=(card,), driver="580.0")


def settings(**train: object) -> config.Config:
    return config.parse({"model": {"name": "a/b"}, "data": {"train": "a/c"}, "train": {"batch_rows": 64, **train}})


def test_bf16_only_where_the_chip_has_it() -> None:
    assert autoconfig.resolve(settings(), CPU, LLAMA_8B).dtype == "float32"
    assert autoconfig.resolve(settings(), gpu("NVIDIA H100 80GB HBM3", 80), LLAMA_8B).dtype == "bfloat16"
    assert autoconfig.resolve(settings(), gpu("Tesla T4", 15, (7, 5)), LLAMA_8B).dtype == "float32"


def test_recomputation_only_when_memory_asks_for_it() -> None:
    h200 = autoconfig.resolve(settings(), gpu("NVIDIA H200", 139), LLAMA_8B)
    small = autoconfig.resolve(settings(), gpu("an NVIDIA GPU", 21, (8, 9)), LLAMA_8B)
    assert (h200.gradient_checkpointing, small.gradient_checkpointing) == ("none", "unsloth")
    assert h200.micro_batch_rows > small.micro_batch_rows == 1


def test_full_fine_tuning_holds_fp32_weights_where_they_fit_and_else_rounds_by_chance() -> None:
    """Never plain bf16. Llama-3.1-8B: 16 bytes a weight are 120 GiB, and autocast's copies."""
    small = replace(LLAMA_8B, layers=8)
    for shape, memory_gib, optimizer, told in [
        (small, 80, "adamw_torch_fused", "fp32, computed with in bf16"),
        (LLAMA_8B, 80, "adamw_8bit", "bf16, their updates rounded up or down by chance"),
        (LLAMA_8B, 139, "adamw_8bit", "bf16, their updates rounded up or down by chance"),
    ]:
        chosen = autoconfig.resolve(settings(method="full"), gpu("a GPU", memory_gib), shape)
        named = {setting.name: setting for setting in chosen.settings}
        assert (chosen.optimizer, named["trained weights"].value, chosen.fits) == (optimizer, told, True)
        assert named["trained weights"].reason and named["optimizer"].reason
    assert "fp32 weights and moments need about 1" in (named["optimizer"].reason or "")
    assert "trained weights" not in {
        each.name for each in autoconfig.resolve(settings(method="full"), CPU, small).settings
    }
    asked = config.parse({"model": {"name": "a/b", "dtype": "bfloat16"}, "data": {"train": "a/c"}, "train": FULL})
    assert autoconfig.resolve(asked, replace(CPU, memory_gib=80), LLAMA_8B).optimizer == "adamw_8bit"


def test_a_paged_optimizer_is_for_a_gpu_with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, here = settings(optimizer="paged_adamw_8bit"), gpu("NVIDIA H100", 80)
    chosen = autoconfig.resolve(settings(optimizer="paged_adamw_8bit", **FULL), here, replace(LLAMA_8B, layers=8))
    assert chosen.optimizer == "paged_adamw_8bit" and chosen.fp32_masters and not chosen.stochastic_rounding
    with pytest.raises(ConfigError, match=r"train.optimizer=paged_adamw_8bit needs a GPU, .*train.optimizer=auto"):
        autoconfig.check_paged(asked, CPU, needs_package=False)
    autoconfig.check_paged(settings(), CPU, needs_package=True)
    autoconfig.check_paged(asked, here, needs_package=False)
    for found in (None, object()):
        monkeypatch.setattr(autoconfig.importlib.util, "find_spec", lambda name, found=found: found)
        with nullcontext() if found else pytest.raises(ConfigError, match="needs bitsandbytes"):
            autoconfig.check_paged(asked, here, needs_package=True)


def test_the_learning_rate_is_that_of_the_method() -> None:
    for train, rate, told in [({}, 2e-4, True), (FULL, 2e-5, True), (FULL | {"learning_rate": 1e-4}, 1e-4, False)]:
        asked = settings(**train)
        chosen = autoconfig.resolve(asked, CPU, LLAMA_8B)
        assert chosen.apply(asked).train.learning_rate == rate
        named = {setting.name: setting for setting in chosen.settings}["learning rate"]
        assert named.value.startswith(f"{rate:g}") and ("https://arxiv.org" in (named.reason or "")) is told


def test_the_micro_batch_divides_the_batch() -> None:
    for memory_gib in (24, 40, 60, 80, 139):
        chosen = autoconfig.resolve(settings(batch_rows=48), gpu("NVIDIA H100", memory_gib), LLAMA_8B)
        assert 48 % chosen.micro_batch_rows == 0


def test_what_the_config_says_stands_and_needs_no_reason() -> None:
    asked = settings(micro_batch_rows=2, gradient_checkpointing="full", optimizer="adamw_8bit")
    chosen = autoconfig.resolve(asked, gpu("NVIDIA H200", 139), LLAMA_8B)
    assert (chosen.micro_batch_rows, chosen.gradient_checkpointing, chosen.optimizer) == (2, "full", "adamw_8bit")
    reasons = {setting.name: setting.reason for setting in chosen.settings}
    assert reasons["batch"] is reasons["checkpointing"] is reasons["optimizer"] is None
    assert reasons["dtype"]


def test_every_automatic_choice_has_a_reason_and_is_written_out() -> None:
    asked = settings()
    chosen = autoconfig.resolve(asked, CPU, LLAMA_8B)
    reasons = {setting.name: setting.reason for setting in chosen.settings}
    assert all(reasons[name] for name in ("dtype", "batch", "checkpointing", "optimizer"))
    resolved = chosen.apply(asked)
    assert "auto" not in config.dump(resolved).replace("format: auto", "")  # that is chosen anew for each file
    assert autoconfig.resolve(resolved, CPU, LLAMA_8B).apply(resolved) == resolved


def test_shape_counts_llama_3_1_8b() -> None:
    transformers = pytest.importorskip("transformers")
    architecture = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert Shape.of(architecture) == LLAMA_8B
    assert LLAMA_8B.parameters == 8_030_261_248  # as transformers counts it
    assert LLAMA_8B.adapter_weights(64, list(SEVEN_PROJECTIONS)) == 167_772_160


def test_all_experts_are_kept_and_the_active_ones_computed() -> None:
    """As Mixtral-8x7B publishes them: 46.7 billion parameters, 12.9 of them for a token."""
    kind = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    kind |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}
    mixtral = Shape.of(SimpleNamespace(**kind, num_local_experts=8, num_experts_per_tok=2))
    assert mixtral.parameters == pytest.approx(46.7e9, rel=0.002)
    assert mixtral.computed.parameters == pytest.approx(12.9e9, rel=0.002)
    found = autoconfig.resolve(settings(), gpu("NVIDIA H200", 139), mixtral)
    named = {setting.name: setting for setting in found.settings}
    assert named["experts"].value == "8, 2 of them a token" and "never been checked" in (named["experts"].reason or "")
    assert not autoconfig.resolve(settings(), gpu("NVIDIA H100", 80), mixtral).fits
    qwen = Shape.of(SimpleNamespace(**kind, num_experts=60, moe_intermediate_size=1408, n_shared_experts=4))
    assert (qwen.mlp, qwen.experts, qwen.active_experts) == (1408, 64, 64)  # how many are active is not said: all


def test_a_model_of_unknown_sizes_is_a_line() -> None:
    with pytest.raises(ModelError, match="mamba.* has no num_attention_heads"):
        Shape.of(SimpleNamespace(model_type="mamba", hidden_size=64, num_hidden_layers=2, vocab_size=100))


def test_what_needs_a_gpu_is_not_suggested_on_a_cpu() -> None:
    assert remedies.smaller(settings(), gpu=True)[0] == "train.gradient_checkpointing=unsloth"
    assert remedies.smaller(settings(), gpu=False)[0] == "train.gradient_checkpointing=full"
    text = " ".join(remedies.smaller(settings(method="full"), gpu=False) + remedies.smaller(settings(), gpu=False))
    assert "unsloth" not in text and "8bit" not in text and "nf4" not in text
    assert "checkpointing" not in " ".join(remedies.smaller(settings(gradient_checkpointing="full"), gpu=False))


@pytest.mark.parametrize("gpu", [name for name in chips.KNOWN_GPUS if name != "h200-141"])
def test_what_is_chosen_is_the_fastest_that_fits(gpu: str) -> None:
    """More rows at once, or no recomputation, would not fit."""
    asked, machine = settings(batch_rows=32), chips.with_gpu(CPU, gpu)
    chosen = autoconfig.resolve(asked, machine, LLAMA_8B)
    usable_gib = autoconfig.usable_memory_gib(machine)
    if chosen.fits:
        assert autoconfig.full_memory(asked, LLAMA_8B, chosen, chosen.micro_batch_rows).total <= usable_gib
    assert autoconfig.full_memory(asked, LLAMA_8B, chosen, 2 * chosen.micro_batch_rows).total > usable_gib
    if chosen.gradient_checkpointing != "none":
        without = replace(chosen, gradient_checkpointing="none")
        assert autoconfig.full_memory(asked, LLAMA_8B, without, 1).total > usable_gib


def test_a_plan_that_does_not_fit_says_so() -> None:
    chosen = autoconfig.resolve(settings(method="full"), gpu("NVIDIA L4", 22, (8, 9)), LLAMA_8B)
    assert not chosen.fits
    batch = next(setting for setting in chosen.settings if setting.name == "batch")
    assert "even one full row needs" in (batch.reason or "")


SMALL = Shape(layers=4, hidden=256, mlp=1024, heads=4, query_width=256, key_width=128, vocab=4096, tied=True)


def behind_a_prompt(prompt: int, rows: int = 32, own: int = 200) -> Batches:
    """Rows of a prompt and of 200 tokens that differ, 16 a step, as encoded for packs of 2,048 tokens."""
    ids = np.concatenate([[*range(prompt), *range(10_000 + 1_000 * i, 10_000 + 1_000 * i + own)] for i in range(rows)])
    length = prompt + own
    supervised = np.tile(np.arange(length) >= prompt + 20, rows)
    starts = np.arange(rows + 1) * length
    part = Rows("rows.jsonl", ids.astype(np.int32), supervised, starts, np.arange(1, rows + 1), Counter())
    return Batches([part], [1.0], 7, 0.0, batch_rows=16, micro_rows=1, max_length=2048, packed=True, pad_id=0)


def test_rows_at_once_are_chosen_by_what_is_computed() -> None:
    """16 rows behind 880 tokens: 6,720 computed in packs of 2,048 tokens, 4,080 in one of 4,096."""
    asked = settings(batch_rows=16)
    chosen, data = autoconfig.resolve(asked, CPU, SMALL), behind_a_prompt(880)
    assert chosen.micro_batch_rows == 1
    shared, shown = autoconfig.share(asked, CPU, chosen, data, auto=True)
    assert shared.micro_batch_rows == data.micro_rows == 2
    assert sum(batch["input_ids"].size for batch in data.micro_batches(0)) == 880 + 16 * 200
    assert "4,080 of 17,280 tokens a step are computed" in shown[0].value
    (batch,) = (each for each in shared.settings if each.name == "batch")
    assert "2,048 at once would compute 6,720 a step" in (batch.reason or "")

    data = behind_a_prompt(880)
    assert autoconfig.share(asked, CPU, chosen, data, auto=False)[0] == chosen and data.least_shared, "asked for"
    data = behind_a_prompt(880)
    little = replace(CPU, memory_gib=autoconfig.full_memory(asked, SMALL, chosen, 2).total)  # 0.8 of it can be used
    assert autoconfig.share(asked, little, chosen, data, auto=True)[0] == chosen and data.least_shared, "no room"
    data = behind_a_prompt(0)
    assert autoconfig.share(asked, CPU, chosen, data, auto=True) == (chosen, []), "nothing in common"


def test_why_a_beginning_is_computed_with_every_row() -> None:
    asked, h100 = settings(batch_rows=16), gpu("NVIDIA H100 80GB HBM3", 80)
    dropped = config.changed(asked, lora={"dropout": 0.1})
    for job, machine, prompt, why_not, told in [
        (dropped, CPU, 880, None, "each row drops out its own"),
        (asked, h100, 880, "its rows see each other in a pack", "see each other"),
        (asked, h100, 8, None, None),  # saves 4 %, which more calls of attention may cost
    ]:
        chosen, data = autoconfig.resolve(job, machine, SMALL), behind_a_prompt(prompt)
        plan, shown = autoconfig.share(job, machine, chosen, data, True, why_not)
        assert plan == chosen and not data.least_shared
        assert [told in (each.reason or "") for each in shown if told] == [True] * bool(told)
    data = behind_a_prompt(880)
    autoconfig.share(asked, h100, autoconfig.resolve(asked, h100, SMALL), data, True)
    assert data.least_shared == autoconfig.GPU_LEAST_SHARED
