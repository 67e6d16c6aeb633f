"""A packed step on Unsloth's own kernels against the padded one: the same loss and the same LoRA gradients, in bf16."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fasttune import config as configuration

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("unsloth"),
]

KERNELS = ("flash", "fmha", "varlen", "efficient", "cudnn")
LOSS_RELATIVE = 1e-3
GRADIENT_RELATIVE = 3e-2  # bf16 keeps 8 bits; the kernels sum in another order


def small_llama(folder: Path) -> Path:
    """A random two-layer Llama with heads of 64, which every fused kernel takes, and the tiny model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fasttune.core import pretrained

    tokenizer = AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_packed_and_padded_rows_teach_the_same(tmp_path: Path) -> None:
    from fasttune import terminal
    from fasttune.core import prepare, trainer as trainers

    tree = {
        "model": {"name": str(small_llama(tmp_path / "model")), "max_length": 256},
        "data": {"train": "builtin:arithmetic", "max_rows": 64},
        "train": {"batch_rows": 8, "max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    job = prepare.prepare(configuration.parse(tree), tmp_path / "run", terminal.Reporter(quiet=True))
    assert job.data.packed, job.warnings
    trainer = trainers.build(job, tmp_path)
    trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # B is zero at the start, which would hide A's gradient
        for parameter in trained.values():
            parameter += 0.05 * torch.randn_like(parameter)

    def step(packed: bool, micro_rows: int) -> tuple[float, dict[str, Any]]:
        batches = trainers.StepCollator(replace(job.data, packed=packed, micro_rows=micro_rows))([{"step": 3}])
        _, learned = trainer.get_batch_samples(iter([batches]), 1, torch.device("cuda"))
        job.model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):  # as accelerate wraps the model in train()
            loss = trainer.training_step(job.model, batches, learned)
        return float(loss), {name: p.grad.float().clone() for name, p in trained.items()}

    packed_loss, packed = step(True, 8)  # the first one is profiled
    assert any(kernel in (trainer.attention_seen or "") for kernel in KERNELS), trainer.attention_seen
    loss, gradients = step(False, 8)
    for what, (other_loss, other) in {
        "packed": (packed_loss, packed),
        "packed, two rows at once": step(True, 2),
        "padded, two rows at once": step(False, 2),
    }.items():
        assert other_loss == pytest.approx(loss, rel=LOSS_RELATIVE), what
        for name, expected in gradients.items():
            error = torch.linalg.vector_norm(other[name] - expected) / torch.linalg.vector_norm(expected)
            assert error < GRADIENT_RELATIVE, f"{name} {error:.1e} {what}"


def test_packs_run_one_variable_length_kernel(tmp_path: Path) -> None:
    """Not one SDPA call for every length in a pack, which is what Unsloth does with torch 2.11 by itself."""
    from unsloth.utils import attention_dispatch

    if attention_dispatch.HAS_FLASH_ATTENTION:
        pytest.skip("flash-attn is installed: Unsloth takes it")
    from fasttune.core import train

    tree = {
        "model": {"name": str(small_llama(tmp_path / "model")), "max_length": 256},
        "data": {"train": "builtin:arithmetic", "max_rows": 64},
        "train": {"batch_rows": 8, "max_steps": 2},
        "output_dir": str(tmp_path / "run"),
    }
    from fasttune.terminal import Reporter

    result = train.run(configuration.parse(tree), Reporter(quiet=True))
    assert result.status == "completed" and "scaled_dot_product" not in result.backend.attention
    assert "flash_attention_forward" in result.backend.attention or "varlen" in result.backend.attention
