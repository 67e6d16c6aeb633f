"""A model divided among processes (UNSLOTH_FSDP2=1) is trained as a whole one: the same losses, the same weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_nursery import Nursery
from safetensors.torch import load_file
from test_ranks import CLOSE, FOUR, KINDS, changed, numbers
from tiny_run import settings

from fasttune.core import checkpoint, sharded
from fasttune.errors import FasttuneError

KINDS = KINDS | {"ranks without rows": {"train": {"batch_rows": 2}}}  # of three
HELD_OUT = {"data": {"eval": "builtin:arithmetic"}, "eval": {"rows": 8, "every": "2 steps", "keep_best": True}}


def by_night(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery("unsloth.models.fsdp2_native", "unsloth.models.fsdp2_save", "torch.distributed.fsdp")
    yield made
    made.close()


def same_weights(one: Path, other: Path) -> None:
    """Of the model or adapter that two runs saved."""
    (first,), (second,) = (sorted(folder.glob("*/*model.safetensors")) for folder in (one, other))
    wanted, found = load_file(first), load_file(second)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "full", by_night("padded"), by_night("several packs"), "ranks without rows"])
def test_a_divided_model_trains_as_a_whole_one(tmp_path: Path, nursery: Nursery, kind: str) -> None:
    changes = changed(FOUR, KINDS[kind], HELD_OUT)
    one = nursery.run(tmp_path / "one", 1, changes)
    divided = nursery.run(tmp_path / "divided", 3, changes, divided=True)
    assert divided.codes == [0, 0, 0]
    for step, alone in zip(numbers(divided, "loss", "grad_norm"), numbers(one, "loss", "grad_norm"), strict=True):
        assert step == pytest.approx(alone, **CLOSE)
    for name in ("tokens", "loss_tokens", "padding_tokens"):
        assert numbers(divided, name) == numbers(one, name) or kind == "padded"
    held_out, alone_held_out = divided.told["held_out"], one.told["held_out"]
    assert held_out["best"]["loss"] == pytest.approx(alone_held_out["best"]["loss"], **CLOSE)
    same_weights(tmp_path / "one", tmp_path / "divided")
    assert any("3 parts" in setting["value"] for setting in divided.told["settings"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [by_night("lora"), "full"])
def test_its_checkpoint_is_whole_and_any_number_of_processes_resume(
    tmp_path: Path, nursery: Nursery, method: str
) -> None:
    changes: dict[str, Any] = {"train": {"max_steps": 8, "method": method, "learning_rate": 1e-3}}
    changes["checkpoint"] = {"every": "3 steps", "keep": 5}
    whole = nursery.run(tmp_path / "whole", 2, changes, divided=True)
    folder = tmp_path / "run"
    failed = nursery.run(folder, 2, changes, divided=True, trick="raises_in_the_sixth")
    assert 0 not in failed.codes and [step for step, _ in checkpoint.steps(folder)] == [3]
    for ranks, divided in ((2, True), (3, True), (1, False)):
        copy = tmp_path / f"copy-{ranks}"
        shutil.copytree(folder, copy)
        ended = nursery.run(copy, ranks, changes, resume=True, divided=divided)
        assert set(ended.codes) == {0} and ended.told["resumed_from_step"] == 3
        for found, wanted in zip(numbers(ended), numbers(whole), strict=True):
            assert found == (wanted if ranks == 2 else pytest.approx(wanted, rel=1e-4, abs=1e-6))
        same_weights(tmp_path / "whole", copy)


def test_a_bad_step_on_one_process_is_left_out_on_all(tmp_path: Path, nursery: Nursery) -> None:
    ended = nursery.run(tmp_path / "run", 2, FOUR, divided=True, trick="not_finite")
    assert set(ended.codes) == {0} and len(ended.steps) == 4
    assert any(text.startswith("step 3 was not applied") for text in ended.told["warnings"])


def test_what_does_not_work_with_it_is_refused_by_name(tmp_path: Path) -> None:
    changes = {"data": {"train": "builtin:arithmetic", "eval": "builtin:arithmetic"}, "samples": 2}
    asked = settings(tmp_path, changes | {"lora": {"init": "pissa"}, "eval": {"problems": 3}})
    with pytest.raises(FasttuneError) as refused:
        sharded.check(asked)
    for name in ("samples=0", "eval.problems=0", "lora.init=default"):
        assert name in str(refused.value)
    sharded.check(settings(tmp_path))
