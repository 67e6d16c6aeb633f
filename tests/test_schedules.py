"""The learning rate of every step is that of a formula, and AdamW's settings are those that its live groups have."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tiny_run import STEPS, break_off_after, learned, run, settings, whole_and_copy

from fasttune.core import checkpoint, schedules
from fasttune.errors import ConfigError

HIGHEST = 1e-2


def expected(t: int, steps: int, scheduler: str, warmup: int, lowest: float = 0.0, decay: int = 0) -> float:
    """Of step t, the first is 0: written down again from the literature, without the code under test."""
    if t < warmup:
        begin = lowest if scheduler == "wsd" else 0.0
        return begin + (HIGHEST - begin) * t / warmup
    share = {
        "linear": lambda: (steps - t) / (steps - warmup),
        "cosine": lambda: (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2,
        "constant": lambda: 1.0,
        "wsd": lambda: 1.0 if t < steps - decay else 1 - math.sqrt((t - steps + decay) / decay),
    }[scheduler]()
    return lowest + (HIGHEST - lowest) * share


def learning_rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Settings that no checkpoint of before has in its identity.
NEWER = [f"train.{name}" for name in "betas decay_ratio embedding_learning_rate min_learning_rate warmup_steps".split()]
NEWER += ["lora.train_embeddings", "lora.plus_ratio", "lora.refactor_every", "train.group_by_prompt"]

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"scheduler": "linear"}, {"warmup": 0}),  # 0.05 of 8 steps
    ({"scheduler": "linear", "warmup_steps": 3, "min_learning_rate": 1e-3}, {"warmup": 3, "lowest": 1e-3}),
    ({"scheduler": "cosine", "warmup_ratio": 0.25}, {"warmup": 2}),
    ({"scheduler": "cosine", "warmup_steps": 2, "min_learning_rate": 1e-3}, {"warmup": 2, "lowest": 1e-3}),
    ({"scheduler": "constant", "warmup_steps": 4}, {"warmup": 4}),
    ({"scheduler": "wsd", "warmup_steps": 2, "decay_ratio": 0.5}, {"warmup": 2, "decay": 4}),
    ({"scheduler": "wsd", "min_learning_rate": 1e-3}, {"warmup": 0, "lowest": 1e-3, "decay": 1}),
]


@pytest.mark.parametrize(("train", "formula"), CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_learning_rate_of_every_step(
    unsloth: None, tmp_path: Path, train: dict[str, Any], formula: dict[str, Any]
) -> None:
    run(tmp_path / "run", {"train": train})
    formulas = [expected(t, STEPS, train["scheduler"], **formula) for t in range(STEPS)]
    assert learning_rates(tmp_path / "run") == pytest.approx(formulas, rel=1e-12)


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    scheduler=st.sampled_from(["linear", "cosine", "constant", "wsd"]),
    steps=st.integers(1, 60),
    warmup=st.one_of(st.integers(0, 60), st.floats(0, 0.5)),
    lowest=st.one_of(st.none(), st.floats(0, HIGHEST / 2)),
    decay=st.floats(0.01, 0.5),
)
def test_any_schedule_that_fits(scheduler: str, steps: int, warmup: float, lowest: float | None, decay: float) -> None:
    """As transformers makes it; two groups follow one curve, each from its own highest value."""
    import torch
    import transformers

    train: dict[str, Any] = {"scheduler": scheduler, "learning_rate": HIGHEST, "max_steps": steps}
    train |= {"warmup_steps" if isinstance(warmup, int) else "warmup_ratio": warmup}
    train |= {"min_learning_rate": lowest} if lowest is not None and scheduler != "constant" else {}
    train |= {"decay_ratio": decay} if scheduler == "wsd" else {}
    asked = settings(Path("run"), {"train": train}).train
    rises = warmup if isinstance(warmup, int) else round(warmup * steps)
    falls = max(1, round(decay * steps)) if scheduler == "wsd" else 0
    if isinstance(warmup, float):
        falls = min(falls, max(1, steps - rises))
    if rises + falls > steps:
        with pytest.raises(ConfigError, match=f"do not fit.*this run has {steps} steps"):
            schedules.check(asked, steps)
        return
    schedules.check(asked, steps)
    told = schedules.trainer_settings(asked, steps)
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (HIGHEST, HIGHEST / 10)]
    optimizer = torch.optim.AdamW(groups, lr=told["learning_rate"])
    kind, more = told["lr_scheduler_type"], told.get("lr_scheduler_kwargs")
    live = transformers.get_scheduler(kind, optimizer, told["warmup_steps"], steps, more)
    for t in range(steps):
        rate = expected(t, steps, scheduler, rises, train.get("min_learning_rate", 0.0), falls)
        assert live.get_last_lr() == pytest.approx([rate, rate / 10], rel=1e-9, abs=1e-18)
        optimizer.step()
        live.step()


def test_a_resumed_run_stays_on_its_curve(unsloth: None, tmp_path: Path) -> None:
    train = {"scheduler": "wsd", "warmup_steps": 2, "decay_ratio": 0.5, "min_learning_rate": 1e-3, "betas": [0.8, 0.95]}
    whole = whole_and_copy(tmp_path / "run", 5, {"train": train})
    copy = whole.with_name("copy")
    shutil.rmtree(copy / "checkpoints" / "step-4")
    assert run(copy, {"train": train}, resume=True).resumed_from_step == 2
    assert learning_rates(copy) == learning_rates(whole) and learned(copy) == learned(whole)


def test_checkpoints_without_the_newer_settings_are_those_of_their_defaults(unsloth: None, tmp_path: Path) -> None:
    """A checkpoint of before has none of their names, and the run that resumes from it has no other values."""
    assert run(tmp_path / "run", after=break_off_after(5)).status == "failed"
    place = tmp_path / "run" / "checkpoints" / "step-4"
    state = json.loads((place / "state.json").read_text())
    for name in NEWER:
        del state["identity"][name]
    (place / "state.json").write_text(json.dumps(state))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": (place / "state.json").stat().st_size,
        "sha256": checkpoint.sha256(place / "state.json"),
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert run(tmp_path / "run", resume=True).resumed_from_step == 4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_live_groups_of_the_optimizer(
    unsloth: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Betas as asked for; weight decay on matrices alone, those of an adapter and the embeddings too."""
    from fasttune.core import trainer

    build, seen = trainer.build, []
    monkeypatch.setattr(trainer, "build", lambda *a, **k: seen.append(build(*a, **k)) or seen[-1])
    run(tmp_path / "run", {"train": {"method": method, "betas": [0.9, 0.95], "weight_decay": 0.1, "max_steps": 1}})
    live, decays = seen[0].optimizer, dict[str, float]()
    names = {id(parameter): name for name, parameter in seen[0].model.named_parameters()}
    for group in live.param_groups:
        assert group["betas"] == (0.9, 0.95)
        decays |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    trained = {name: parameter.dim() for name, parameter in seen[0].model.named_parameters() if parameter.requires_grad}
    assert decays == {name: 0.1 if dim > 1 else 0.0 for name, dim in trained.items()}
    kind = "lora_A" if method == "lora" else "embed_tokens"
    assert any(kind in name for name in decays) and (0.0 in decays.values()) == (method == "full")


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio would be ignored beside train.warmup_steps"),
        ({"warmup_ratio": None}, "needs train.warmup_steps"),
        ({"min_learning_rate": 1e-4, "scheduler": "constant"}, "would be ignored by scheduler=constant"),
        ({"min_learning_rate": 2e-2}, "min_learning_rate 0.02 is not below learning_rate 0.01"),
        ({"min_learning_rate": 3e-4, "learning_rate": None}, "is not below learning_rate 0.0002"),
        ({"decay_ratio": 0.2}, "decay_ratio would be ignored by scheduler=linear"),
        ({"scheduler": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.6}, "more than 1 together"),
        ({"betas": [0.9]}, "train.betas"),
        ({"betas": [0.9, 1.0]}, "train.betas.1"),
    ],
)
def test_settings_that_fit_to_no_run(tmp_path: Path, train: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, {"train": train})
    assert told in str(caught.value)


def test_more_warm_up_than_steps_is_refused_when_they_are_known(unsloth: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.warmup_steps: 9 steps of warm-up do not fit: .* has 8 steps"):
        run(tmp_path / "run", {"train": {"warmup_steps": 9}})
    assert not (tmp_path / "run").exists()
