"""A run of several processes is the run of one: the same losses, nothing lost, one voice."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_nursery import Ended, Nursery
from tiny_run import learned

from fasttune.core import checkpoint

CLOSE = {"rel": 1e-5, "abs": 1e-7}
FOUR: dict[str, Any] = {"train": {"max_steps": 4}, "checkpoint": {"every": "never"}}
HELD_OUT = {
    "data": {"eval": "builtin:arithmetic"},
    "eval": {"rows": 8, "problems": 3, "every": "2 steps"},
    "samples": 2,
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def numbers(ended: Ended, *names: str) -> list[list[float]]:
    return [[step[name] for name in names or ("loss", "grad_norm")] for step in ended.steps]


def changed(*trees: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            found[key] = found.get(key, {}) | value if isinstance(value, dict) else value
    return found


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full": {"train": {"method": "full", "learning_rate": 1e-3}},
    "padded": {"train": {"packing": False, "micro_batch_rows": 2}},
    "several packs": {"train": {"micro_batch_rows": 1}},
    "ranks without rows": {"train": {"batch_rows": 3}},
    "odd last step": {"train": {"batch_rows": 7}},
    "refactored": {"lora": {"refactor_every": 2}},
    "embeddings": {"lora": {"train_embeddings": True}},
}
NIGHTLY = ("several packs", "odd last step", "refactored", "embeddings")
BY_NIGHT = {kind: [pytest.mark.nightly] for kind in NIGHTLY}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=BY_NIGHT.get(kind, [])) for kind in KINDS])
def test_any_number_of_ranks_is_the_same_run(tmp_path: Path, nursery: Nursery, kind: str) -> None:
    changes = changed(FOUR, KINDS[kind])
    one, two, four = (nursery.run(tmp_path / str(ranks), ranks, changes) for ranks in (1, 2, 4))
    for ended in (two, four):
        assert set(ended.codes) == {0}
        for step, alone in zip(numbers(ended), numbers(one), strict=True):
            assert step == pytest.approx(alone, **CLOSE)
        for name in ("tokens", "computed_tokens", "loss_tokens"):
            assert numbers(ended, name) == numbers(one, name) or name == "computed_tokens"
    assert one.told["ranks"] is None and four.told["ranks"]["ranks"] == 4
    assert len(four.told["ranks"]["peak_memory_gib"]) == 4 and four.told["ranks"]["straggler"] >= 1


def test_the_mean_of_every_rank_by_itself_is_another_run(tmp_path: Path, nursery: Nursery) -> None:
    """What the comparison above would find."""
    one = nursery.run(tmp_path / "1", 1, FOUR)
    two = nursery.run(tmp_path / "2", 2, FOUR, trick="each_by_itself")
    assert numbers(two)[-1] != pytest.approx(numbers(one)[-1], rel=1e-3)


def test_held_out_rows_and_problems_are_shared(tmp_path: Path, nursery: Nursery) -> None:
    changes = changed(FOUR, HELD_OUT)
    one, two = (nursery.run(tmp_path / str(ranks), ranks, changes) for ranks in (1, 2))
    seen = ("eval_loss", "eval_token_accuracy", "eval_exact_match")
    assert [step["eval_loss"] is not None for step in two.steps] == [False, True, False, True]
    for step, alone in zip(two.steps, one.steps, strict=True):
        assert [step[name] for name in seen] == [
            value and pytest.approx(value, **CLOSE) for value in map(alone.get, seen)
        ]
    assert two.told["samples"] == one.told["samples"] and two.told["exact_match"] == one.told["exact_match"]


def test_all_end_early_together(tmp_path: Path, nursery: Nursery) -> None:
    nothing_learned = {"train": {"learning_rate": 1e-12, "early_stopping_patience": 2, "max_steps": 8}}
    ended = nursery.run(tmp_path / "run", 2, changed(HELD_OUT, nothing_learned, {"eval": {"every": "1 steps"}}))
    assert (ended.codes, ended.told["status"], len(ended.steps)) == ([0, 0], "completed", 3)
    assert "in 2 evaluations" in ended.told["ended_early"]


def test_it_resumes_with_another_number_of_ranks(tmp_path: Path, nursery: Nursery) -> None:
    """Ended after a signal to one rank: all stop after the same step, with one checkpoint."""
    changes = {"train": {"max_steps": 40}, "checkpoint": {"every": "never"}}
    whole = nursery.run(tmp_path / "whole", 2, changes)
    pids = nursery.start(folder := tmp_path / "run", 2, changes)
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    ended = nursery.end()
    assert ended.codes == [143, 143] and ended.told["error"] == "stopped by SIGTERM"
    ((step, _),) = checkpoint.steps(folder)
    assert step == len(ended.steps) < 40
    (tmp_path / "copy").mkdir()
    os.system(f"cp -a {folder}/. {tmp_path}/copy")
    same = nursery.run(folder, 2, changes, resume=True)
    assert numbers(same) == numbers(whole) and learned(folder) == learned(tmp_path / "whole"), "to the same bits"
    other = nursery.run(tmp_path / "copy", 3, changes, resume=True)
    for found, wanted in zip(numbers(other), numbers(whole), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_out_of_memory_on_one_rank_halves_all(tmp_path: Path, nursery: Nursery) -> None:
    changes = changed(FOUR, {"train": {"micro_batch_rows": 8}})
    one = nursery.run(tmp_path / "1", 1, changes)
    two = nursery.run(tmp_path / "2", 2, changes, trick="out_of_memory")
    assert set(two.codes) == {0} and any("out of memory at step 2" in text for text in two.told["warnings"])
    for found, wanted in zip(numbers(two), numbers(one), strict=True):
        assert found == pytest.approx(wanted, **CLOSE)


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(tmp_path: Path, nursery: Nursery) -> None:
    ended = nursery.run(tmp_path / "run", 2, FOUR, trick="not_finite")
    assert set(ended.codes) == {0} and len(ended.steps) == 4
    assert any(text.startswith("step 3 was not applied") for text in ended.told["warnings"])


def test_a_rank_that_hangs_is_named(tmp_path: Path, nursery: Nursery) -> None:
    ended = nursery.run(tmp_path / "run", 2, FOUR, trick="hangs", timeout_s=2)
    assert ended.codes[0] == 1
    assert "rank 1 did not come" in ended.told["error"] and "step 3" in ended.told["error"]


@pytest.mark.parametrize(("trick", "steps"), [("raises", 2), ("raises_at_once", 0)])
def test_the_error_of_another_rank_is_the_run_s(tmp_path: Path, nursery: Nursery, trick: str, steps: int) -> None:
    ended = nursery.run(tmp_path / "run", 2, FOUR, trick=trick)
    assert ended.codes == [1, 1] and len(ended.steps) == steps
    assert "rank 1" in ended.told["error"] and "a bad cable" in ended.told["error"]
    assert "a bad cable" in (tmp_path / "run" / "report.html").read_text()
    assert "in raising" in (tmp_path / "run" / "rank-1.log").read_text(), "where it happened"


@pytest.mark.slow
@pytest.mark.parametrize("most", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_kills_of_any_rank_lose_nothing(tmp_path: Path, nursery: Nursery, most: int) -> None:
    """SIGKILL of a rank at a seeded moment; all start again, as under torchrun --max-restarts."""
    rng = random.Random(most)
    changes = {"train": {"max_steps": 10 * most}, "checkpoint": {"every": "1 steps"}}
    whole = nursery.run(tmp_path / "whole", 2, changes)
    folder = tmp_path / "run"
    for kills in range(most):
        pids = nursery.start(folder, 2, changes, restarts=kills)
        before = (folder / "metrics.jsonl").stat().st_mtime_ns if kills else 0
        while not checkpoint.steps(folder) or (folder / "metrics.jsonl").stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        victim = rng.randrange(2)
        os.kill(pids[victim], signal.SIGKILL)
        assert -signal.SIGKILL in nursery.end().codes
    ended = nursery.run(folder, 2, changes, restarts=most)
    assert set(ended.codes) == {0}
    assert numbers(ended) == numbers(whole) and learned(folder) == learned(tmp_path / "whole")
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
