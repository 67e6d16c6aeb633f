"""What `auto` means on which machine, and that every choice says why."""

from dataclasses import replace

import pytest

from fasttune import config, hardware, plan
from fasttune.hardware import Gpu, Hardware
from fasttune.shape import Shape

LLAMA_8B = Shape(
    layers=32, hidden=4096, mlp=14336, heads=32, query_width=4096, key_width=1024, vocab=128256, tied=False
)
CPU = Hardware("linux", "x86_64", "2.36", "3.11.7", "cpu", cores=2, memory_gib=24, disk_free_gib=100)


def gpu(name: str, memory_gib: float, capability: tuple[int, int] = (9, 0)) -> Hardware:
    card = Gpu(name, capability, memory_gib)
    return Hardware("linux", "x86_64", "2.36", "3.12.3", "cpu", 16, 128, 100, gpus=(card,), driver="580.0")


def settings(**train: object) -> config.Config:
    return config.parse({"model": {"name": "a/b"}, "data": {"train": "a/c"}, "train": {"batch_rows": 64, **train}})


def test_bf16_only_where_the_chip_has_it() -> None:
    assert plan.resolve(settings(), CPU, LLAMA_8B).dtype == "float32"
    assert plan.resolve(settings(), gpu("NVIDIA H100 80GB HBM3", 80), LLAMA_8B).dtype == "bfloat16"
    assert plan.resolve(settings(), gpu("Tesla T4", 15, (7, 5)), LLAMA_8B).dtype == "float32"


def test_recomputation_only_when_memory_asks_for_it() -> None:
    h200 = plan.resolve(settings(), gpu("NVIDIA H200", 139), LLAMA_8B)
    small = plan.resolve(settings(), gpu("NVIDIA L4", 22, (8, 9)), LLAMA_8B)
    assert (h200.gradient_checkpointing, small.gradient_checkpointing) == ("none", "unsloth")
    assert h200.micro_batch_rows > small.micro_batch_rows == 1


def test_full_fine_tuning_takes_8_bit_states_when_fp32_ones_do_not_fit() -> None:
    assert plan.resolve(settings(method="full"), gpu("NVIDIA H200", 139), LLAMA_8B).optimizer == "adamw_torch_fused"
    assert plan.resolve(settings(method="full"), gpu("NVIDIA H100", 60), LLAMA_8B).optimizer == "adamw_8bit"


def test_the_micro_batch_divides_the_batch() -> None:
    for memory_gib in (24, 40, 60, 80, 139):
        chosen = plan.resolve(settings(batch_rows=48), gpu("NVIDIA H100", memory_gib), LLAMA_8B)
        assert 48 % chosen.micro_batch_rows == 0


def test_what_the_config_says_stands_and_needs_no_reason() -> None:
    asked = settings(micro_batch_rows=2, gradient_checkpointing="full", optimizer="adamw_8bit")
    chosen = plan.resolve(asked, gpu("NVIDIA H200", 139), LLAMA_8B)
    assert (chosen.micro_batch_rows, chosen.gradient_checkpointing, chosen.optimizer) == (2, "full", "adamw_8bit")
    reasons = {setting.name: setting.reason for setting in chosen.settings}
    assert reasons["batch"] is reasons["checkpointing"] is reasons["optimizer"] is None
    assert reasons["dtype"]


def test_every_automatic_choice_has_a_reason_and_is_written_out() -> None:
    asked = settings()
    chosen = plan.resolve(asked, CPU, LLAMA_8B)
    reasons = {setting.name: setting.reason for setting in chosen.settings}
    assert all(reasons[name] for name in ("dtype", "batch", "checkpointing", "optimizer"))
    resolved = chosen.apply(asked)
    assert "auto" not in config.dump(resolved).replace("format: auto", "")  # that is chosen anew for each file
    assert plan.resolve(resolved, CPU, LLAMA_8B).apply(resolved) == resolved


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
    assert LLAMA_8B.adapter_weights(64, list(config.SEVEN_PROJECTIONS)) == 167_772_160


@pytest.mark.parametrize("gpu", [name for name in hardware.KNOWN_GPUS if name != "h200-141"])
def test_what_is_chosen_is_the_fastest_that_fits(gpu: str) -> None:
    """More rows at once, or no recomputation, would not fit."""
    asked, machine = settings(batch_rows=32), hardware.with_gpu(CPU, gpu)
    chosen = plan.resolve(asked, machine, LLAMA_8B)
    usable_gib = plan.USABLE_MEMORY * plan.memory_gib(machine)
    if chosen.fits:
        assert plan.full_memory(asked, LLAMA_8B, chosen, chosen.micro_batch_rows).total <= usable_gib
    assert plan.full_memory(asked, LLAMA_8B, chosen, 2 * chosen.micro_batch_rows).total > usable_gib
    if chosen.gradient_checkpointing != "none":
        without = replace(chosen, gradient_checkpointing="none")
        assert plan.full_memory(asked, LLAMA_8B, without, 1).total > usable_gib


def test_a_plan_that_does_not_fit_says_so() -> None:
    chosen = plan.resolve(settings(method="full"), gpu("NVIDIA L4", 22, (8, 9)), LLAMA_8B)
    assert not chosen.fits
    batch = next(setting for setting in chosen.settings if setting.name == "batch")
    assert "even one full row needs" in (batch.reason or "")
