"""How rows are laid out changes nothing that is learned: packed, padded, in one micro-batch or in eight."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fasttune import config as configuration

ROWS = 8
RELATIVE = 1e-5
Layout = tuple[bool, int] | tuple[bool, int, bool]  # packed?, full rows at once, common beginnings computed once?

Step = tuple[float, dict[str, Any]]  # loss, gradient of every trained parameter


def settings(tmp_path: Path, **train: Any) -> configuration.Config:
    """A run on 64 short conversations behind the same system turn: four questions with many answers, of which some are
    followed by another question (there the first answer is read, in other rows it is trained on)."""
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(64):
            asked = f"What is {i % 4} plus {7 * (i % 4)}?"
            turns = [("system", "You are a patient teacher."), ("user", asked), ("assistant", f"It is {8 * (i % 4)}.")]
            turns += [("user", "Are you sure?"), ("assistant", f"Yes, {i}." * (1 + i % 5))] if i % 3 else []
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return configuration.parse(
        {
            "model": {"name": "builtin:tiny", "max_length": 256},
            "data": {"train": str(rows), "train_on": "last"},
            "train": {"batch_rows": ROWS, "max_steps": 1, **train},
            "output_dir": str(tmp_path / "run"),
        }
    )


@pytest.fixture(scope="module", params=["lora", "full"])
def step(
    request: pytest.FixtureRequest, unsloth: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Step]:
    """Loss and gradients of step 3 in a given layout, through the live trainer."""
    import torch

    from fasttune import terminal
    from fasttune.core import prepare, trainer as trainers

    folder = tmp_path_factory.mktemp(request.param)
    job = prepare.prepare(settings(folder, method=request.param), folder / "run", terminal.Reporter(quiet=True))
    trainer = trainers.build(job, folder)
    with torch.no_grad():  # B is zero at the start, which would hide A's gradient
        generator = torch.Generator().manual_seed(1)
        for parameter in job.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def run(packed: bool, micro_rows: int, shared: bool = False) -> Step:
        layout = replace(job.data, packed=packed, micro_rows=micro_rows, least_shared=8 * shared)
        batches = trainers.StepCollator(layout)([{"step": 3}])
        assert any("segment_parents" in batch for batch in batches) == shared
        if shared and micro_rows == ROWS:  # below the system turn a question, below it an answer that is trained on
            parents, owners = (batches[0][name].tolist() for name in ("segment_parents", "segment_owners"))
            assert any(parents[parent] >= 0 for parent in parents if parent >= 0)
            assert any(owners[parent] >= 0 for parent in parents if parent >= 0)
        _, learned = trainer.get_batch_samples(iter([batches]), 1, torch.device("cpu"))
        job.model.zero_grad()
        loss = trainer.training_step(job.model, batches, learned)
        named = job.model.named_parameters()
        return float(loss), {name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None}

    return run


@pytest.mark.parametrize(
    "layout",
    [(True, 8), (True, 1), (True, 2), (True, 8, True), (True, 1, True), (False, 1), (False, 2), (False, 4)],
    ids=str,
)
def test_every_layout_gives_the_same_step(step: Callable[..., Step], layout: Layout) -> None:
    import torch

    loss, gradients = step(False, ROWS)  # the reference: all rows in one padded rectangle
    other_loss, other = step(*layout)
    assert other_loss == pytest.approx(loss, rel=RELATIVE)
    assert len(gradients) > 10
    assert set(other) == set(gradients)
    for name, expected in gradients.items():
        assert expected.abs().max() > 0, name
        difference = torch.linalg.vector_norm(other[name] - expected) / torch.linalg.vector_norm(expected)
        assert difference < RELATIVE, f"{name} {difference:.1e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pack_is_proved_and_every_leak_is_found(unsloth: None, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    from fasttune.core import model as models, packing
    from fasttune.settings import ModelConfig

    wanted = ModelConfig(name="builtin:tiny", max_length=64)
    model, _ = models.load(wanted, dtype, "none", False, 0)
    assert packing.enable(model, 64) is None  # in bf16 rounding alone moves logits by more than a percent
    assert packing.enable_shared(model, 64) is None

    def forgetful(*args: Any, packed_seq_lengths: Any = None, segment_parents: Any = None, **kwargs: Any) -> Any:
        return packing.sdpa_attention_forward(*args, **kwargs)

    def unshared(*args: Any, segment_parents: Any = None, **kwargs: Any) -> Any:
        return rows_attention(*args, **kwargs)

    def shifted(*args: Any, packed_seq_lengths: Any = None, **kwargs: Any) -> Any:
        if packed_seq_lengths is not None:  # the last row begins a token early
            packed_seq_lengths = packed_seq_lengths.clone()
            packed_seq_lengths[-2:] += packed_seq_lengths.new_tensor([-1, 1])
        return rows_attention(*args, packed_seq_lengths=packed_seq_lengths, **kwargs)

    def faint(*args: Any, packed_seq_lengths: Any = None, **kwargs: Any) -> Any:
        """Less than bf16 rounds away in the logits: only the gradient shows it."""
        own = rows_attention(*args, packed_seq_lengths=packed_seq_lengths, **kwargs)[0]
        return own if packed_seq_lengths is None else own + 1e-2 * forgetful(*args, **kwargs)[0], None

    rows_attention = packing.rows_attention
    for broken in (forgetful, unshared, shifted, faint):
        monkeypatch.setattr(packing, "rows_attention", broken)
        assert broken is unshared or packing.enable(model, 64), broken
        assert broken is shifted or packing.enable_shared(model, 64), broken
    monkeypatch.setattr(packing, "rows_attention", rows_attention)
    model.config.attention_dropout = 0.1
    assert "drops out" in (packing.enable(model, 64) or "")
    model.config.attention_dropout = 0.0
    model.config.attention_chunk_size = 16
    assert "chunks of 16 tokens" in (packing.enable(model, 64) or "")


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Gemma3"])
def test_a_sliding_window_ends_within_each_row(unsloth: None, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Rows longer than the window, some behind a beginning that is: as eager attention computes each one alone."""
    import numpy as np
    import torch
    import transformers

    from fasttune.core import packing
    from fasttune.data import sharing
    from fasttune.data.sharing import flat, paths

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256, "sliding_window": 24}
    sizes |= {"num_hidden_layers": 2, "attn_logit_softcapping": None, "pad_token_id": 0}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"]} if family != "Mistral" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rng = np.random.default_rng(0)
    common = rng.integers(1, 128, 40)
    rows = [np.concatenate([common, rng.integers(1, 128, own)]) for own in (20, 70)] + [rng.integers(1, 128, 90)]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = [model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids in rows]
    model.set_attn_implementation("sdpa")
    assert packing.enable(model, 128) is None
    encoded = [(ids, np.zeros(len(ids), bool)) for ids in rows]
    for segments in (None, sharing.tree(encoded)):
        pack = flat(encoded, segments)
        with torch.no_grad():
            logits = packing._logits(model, pack)[0]
        for path, expected in zip(paths(pack), alone, strict=True):
            assert packing._difference(logits[packing._places(pack, path)], expected) < 1e-5

    rows_attention = packing.rows_attention
    monkeypatch.setattr(packing, "rows_attention", lambda *a, sliding_window=None, **k: rows_attention(*a, **k))
    assert "alone" in (packing.enable(model, 128) or "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_positions_that_do_not_restart_are_found(unsloth: None, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """In a model with a vector a position; rotary ones are relative."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from fasttune.core import packing

    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.0)
    model = GPT2LMHeadModel(sizes).to(getattr(torch, dtype))
    with torch.no_grad():
        model.transformer.wpe.weight *= 20
    assert packing.enable(model, 64) is None
    forward = model.forward

    def going_on(position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", going_on)
    assert "alone" in (packing.enable(model, 64) or "")


def test_an_error_of_the_device_is_not_taken_for_a_leak(unsloth: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune.core import model as models, packing
    from fasttune.settings import ModelConfig

    wanted = ModelConfig(name="builtin:tiny", max_length=64, dtype="float32")
    model, _ = models.load(wanted, "float32", "none", False, 0)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        packing.enable(model, 64)


def test_such_a_model_trains_padded_with_a_warning(
    unsloth: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune import terminal
    from fasttune.core import packing, train as training

    monkeypatch.setattr(packing, "enable", lambda model, max_length: "it has a memory")
    result = training.run(settings(tmp_path), terminal.Reporter(quiet=True))
    assert result.status == "completed"
    assert result.backend.packing.startswith("padded")
    assert result.warnings == ["rows are padded, not packed: it has a memory"]
    assert "packing: false" in (tmp_path / "run" / "config.yaml").read_text()


def test_generation_with_padded_prompts_is_unchanged(unsloth: None) -> None:
    """The model that was made ready for packs answers a padded batch like a plain one."""
    import torch

    from fasttune.core import model as models, packing
    from fasttune.settings import ModelConfig

    wanted = ModelConfig(name="builtin:tiny", max_length=64, dtype="float32")
    model, _ = models.load(wanted, "float32", "none", False, 0)
    ids = torch.randint(3, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert packing.enable(model, 64) is None
    assert model.config._attn_implementation == packing.NAME
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False), plain)
