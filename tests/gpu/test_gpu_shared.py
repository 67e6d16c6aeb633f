"""Beginnings that rows share, computed once by Flash Attention on the card: exact, and the same gradients."""

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

# 880 tokens, below them two questions, the first with two answers; and a row by itself.
LENGTHS, PARENTS = [880, 60, 130, 95, 140, 200], [-1, 0, 1, 1, 0, -1]
RELATIVE = 2e-2  # bf16 keeps 8 bits


def test_it_is_attention_with_the_mask_of_the_tree() -> None:
    from fasttune.core.shared_attention import Pack, SharedAttention

    torch.manual_seed(0)
    tokens, scale = sum(LENGTHS), 128**-0.5
    q, k, v, dout = (torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8, 32))
    rows = torch.arange(tokens, device="cuda")
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    sees = [{number} for number in range(len(LENGTHS))]
    for number, parent in enumerate(PARENTS):
        sees[number] |= sees[parent] if parent >= 0 else set()
    allowed = torch.tensor([[key in sees[query] for key in range(len(LENGTHS))] for query in range(len(LENGTHS))])
    mask = allowed.cuda()[segment][:, segment] & (rows[:, None] >= rows)

    def dense(q: Any, k: Any, v: Any) -> Any:
        repeated = (each.repeat_interleave(4, 1) for each in (k, v))
        heads = (each.double().transpose(0, 1) for each in (q, *repeated))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1)

    found = []
    for attention in (dense, lambda *qkv: SharedAttention.apply(*qkv, scale, Pack(LENGTHS, PARENTS, "cuda"))):
        leaves = [each.clone().requires_grad_() for each in (q, k, v)]
        out = attention(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for expected, mine in zip(*found, strict=True):
        difference = torch.linalg.vector_norm(mine.double() - expected) / torch.linalg.vector_norm(expected)
        assert difference < RELATIVE


def test_a_step_that_shares_teaches_what_one_does_that_does_not(tmp_path: Path) -> None:
    import json

    from test_gpu_packed import GRADIENT_RELATIVE, LOSS_RELATIVE, small_llama

    from fasttune import terminal
    from fasttune.core import prepare, trainer as trainers

    prompt = "You add numbers, carefully, digit by digit, and write the sum at the end. " * 3
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(32):
            turns = [("system", prompt), ("user", f"{i} + {7 * i}?"), ("assistant", f"{8 * i}." * (1 + i % 4))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    tree = {
        "model": {"name": str(small_llama(tmp_path / "model")), "max_length": 512},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "train": {"batch_rows": 8, "max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    job = prepare.prepare(configuration.parse(tree), tmp_path / "run", terminal.Reporter(quiet=True))
    assert job.data.least_shared, [f"{each.name}: {each.value} ({each.reason})" for each in job.settings]
    trainer = trainers.build(job, tmp_path)
    trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # B is zero at the start, which would hide A's gradient
        for parameter in trained.values():
            parameter += 0.05 * torch.randn_like(parameter)

    def step(least_shared: int) -> tuple[float, dict[str, Any]]:
        batches = trainers.StepCollator(replace(job.data, least_shared=least_shared))([{"step": 1}])
        assert any("segment_parents" in batch for batch in batches) == (least_shared > 0)
        _, supervised = trainer.get_batch_samples(iter([batches]), 1, torch.device("cuda"))
        job.model.zero_grad()
        loss = trainer.training_step(job.model, batches, supervised)
        return float(loss), {name: p.grad.float().clone() for name, p in trained.items()}

    loss, gradients = step(0)
    other_loss, other = step(job.data.least_shared)
    assert other_loss == pytest.approx(loss, rel=LOSS_RELATIVE)
    for name, expected in gradients.items():
        assert torch.linalg.vector_norm(other[name] - expected) < GRADIENT_RELATIVE * torch.linalg.vector_norm(expected)
