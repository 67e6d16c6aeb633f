"""The fused LoRA of the CPU learns exactly what PEFT's own does, and steps aside where it is not plain LoRA."""

from pathlib import Path
from typing import Any

import pytest

RELATIVE = 1e-5
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(unsloth: None) -> Any:
    return tiny_lora()


def tiny_lora(dropout: float = 0.0, rank: int = 8) -> Any:
    import torch

    from fasttune.core import model as models
    from fasttune.settings import LoraConfig, ModelConfig

    wanted = ModelConfig(name="builtin:tiny", max_length=64, dtype="float32")
    base, _ = models.load(wanted, "float32", "none", False, 0)
    made = models.add_lora(base, LoraConfig(rank=rank, dropout=dropout, targets=TARGETS), "none", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B is zero at the start, which would hide A's gradient
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("rank", [1, 8, 16, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_its_gradients_are_those_of_the_formula(unsloth: None, rank: int, bias: bool) -> None:
    import torch

    from fasttune.cpu.fused_lora import FusedLora

    torch.manual_seed(0)

    def tensor(*shape: int, learned: bool = True) -> Any:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=learned)

    x, a, b = tensor(2, 3, 6), tensor(rank, 6), tensor(5, rank)
    weight, offset = tensor(5, 6, learned=False), tensor(5, learned=False) if bias else None
    expected = torch.nn.functional.linear(x, weight + 0.5 * b @ a, offset)
    torch.testing.assert_close(FusedLora.apply(x, weight, offset, a, b, 0.5), expected)
    assert torch.autograd.gradcheck(lambda x, a, b: FusedLora.apply(x, weight, offset, a, b, 0.5), (x, a, b))


@pytest.mark.parametrize("rank", [8, 16])
def test_a_step_is_that_of_peft(unsloth: None, rank: int) -> None:
    import torch

    from fasttune.cpu import fused_lora

    model = tiny_lora(rank=rank)
    ids = torch.randint(200, (3, 40), generator=torch.Generator().manual_seed(0))

    def step() -> tuple[float, dict[str, Any]]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    loss, gradients = step()
    assert fused_lora.live_layers(model) == 0
    assert fused_lora.enable(model) == fused_lora.live_layers(model) == 2 * len(TARGETS)
    fused_loss, fused = step()
    assert fused_loss == pytest.approx(loss, rel=RELATIVE)
    for name, expected in gradients.items():
        assert expected.abs().max() > 0, name
        difference = torch.linalg.vector_norm(fused[name] - expected) / torch.linalg.vector_norm(expected)
        assert difference < RELATIVE, f"{name} {difference:.1e}"


def test_adapters_can_still_be_disabled_and_merged(model: Any) -> None:
    import torch

    from fasttune.cpu import fused_lora

    fused_lora.enable(model)
    ids = torch.arange(20)[None]

    def logits() -> Any:
        return model(input_ids=ids).logits.detach()  # with gradients: the fused forward where it is plain LoRA

    with_adapter = logits()
    with model.disable_adapter():
        without = logits()
    assert (with_adapter - without).abs().max() > 0.01
    model.merge_adapter()
    torch.testing.assert_close(logits(), with_adapter, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(logits(), with_adapter, rtol=1e-3, atol=1e-4)


def test_only_plain_fp32_layers_are_fused(unsloth: None) -> None:
    import torch

    from fasttune.cpu import fused_lora

    assert fused_lora.enable(tiny_lora(dropout=0.1)) == 0
    assert fused_lora.enable(tiny_lora().to(torch.bfloat16)) == 0


def test_a_run_says_that_it_was_fused(unsloth: None, tmp_path: Path) -> None:
    from fasttune import config, terminal
    from fasttune.core import prepare, trainer as trainers, what_ran

    wanted = config.parse(
        {
            "model": {"name": "builtin:tiny", "max_length": 256},
            "data": {"train": "builtin:arithmetic", "max_rows": 16},
            "train": {"max_steps": 1},
            "output_dir": str(tmp_path / "run"),
        }
    )
    job = prepare.prepare(wanted, tmp_path / "run", terminal.Reporter(quiet=True))
    layers = 7 * job.plan.shape.layers
    assert any(setting.value == f"fused in {layers} layers" for setting in job.settings)
    assert f"LoRA fused in {layers} layers" in what_ran.backend(trainers.build(job, tmp_path)).library
