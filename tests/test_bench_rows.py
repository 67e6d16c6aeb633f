"""How many rows an arm of a benchmark computes at once, and how many tokens the limit is measured at."""

from pathlib import Path
from typing import Any

import pytest

from fasttune import config
from fasttune.bench import worker
from fasttune.metrics import Backend
from tests.test_bench import repeat


def job(**train: Any) -> config.Config:
    tree = {"model": {"name": "builtin:tiny", "max_length": 100}, "data": {"train": "builtin:arithmetic"}}
    return config.parse({**tree, "train": {"batch_rows": 6, "micro_batch_rows": 6} | train})


def test_an_arm_out_of_memory_begins_anew_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    asked = []

    def once(arm: str, now: config.Config, *_: Any) -> Any:
        asked.append(now.train.micro_batch_rows)
        if now.train.micro_batch_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return repeat(backend=Backend("peft", "sdpa", "padded", 0, "none", "bfloat16"))

    monkeypatch.setattr(worker, "measure_once", once)
    found = worker.measure("vanilla", job(), 2, Path(), Path())
    assert asked == [6, 3, 2]
    assert found.backend.packing == "padded, 2 at once: 6 ran out of memory"
    with pytest.raises(torch.OutOfMemoryError):  # by itself it does less at once already
        worker.measure("fasttune", job(), 2, Path(), Path())
    assert asked == [6, 3, 2, 6]


def test_the_limit_is_measured_at_the_packs_that_run() -> None:
    def row(length: int) -> tuple[list[int], list[bool]]:
        return [5] * length, [i >= length - 4 for i in range(length)]

    step = [row(90), row(80), row(10), row(20)]
    packed = worker.at_once(job(batch_rows=4, micro_batch_rows=1), [step])  # 90 + 10 and 80 + 20
    assert packed == (100, 8)
    padded = worker.at_once(job(batch_rows=4, micro_batch_rows=2, packing=False), [step])  # 2 × 90 and 2 × 20
    assert padded == (round((180 * 180 + 40 * 40) / 220), 8)
