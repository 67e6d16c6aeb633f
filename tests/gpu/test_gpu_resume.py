"""A resumed run on a GPU stays close to one that was not broken off, and a step that does not fit is done in pieces."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fasttune import config as configuration, terminal

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("unsloth"),
]

LOSS_RELATIVE = 5e-3  # bf16, and kernels that add in no fixed order
STEPS = 8


class BreakOff(terminal.Reporter):
    """The process ends, as far as the run can see, after a step."""

    def __init__(self, after: int | None) -> None:
        super().__init__(quiet=True)
        self.after = after

    def step(self, step: Any) -> None:
        if step.step == self.after:
            raise RuntimeError("the machine is gone")


def run(folder: Path, resume: bool = False, break_off_after: int | None = None, **train: Any) -> Any:
    from fasttune.core import train as training

    tree = {
        "model": {"name": "builtin:tiny", "max_length": 512},
        "data": {"train": "builtin:arithmetic", "max_rows": 64},
        "train": {"batch_rows": 16, "max_steps": STEPS, "learning_rate": 1e-2} | train,
        "checkpoint": {"every": "2 steps"},
        "output_dir": str(folder),
    }
    return training.run(configuration.parse(tree), BreakOff(break_off_after), folder if resume else None)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "optimizer"),
    list(product(("lora", "full"), ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"))),
)
def test_a_resumed_run_is_close(tmp_path: Path, method: str, optimizer: str) -> None:
    if optimizer == "paged_adamw_8bit" or (method, optimizer) == ("lora", "adamw_8bit"):
        pytest.importorskip("bitsandbytes")
    job: dict[str, Any] = {
        "method": method,
        "optimizer": optimizer,
        "learning_rate": 1e-2 if method == "lora" else 1e-3,
    }
    run(tmp_path / "whole", **job)
    run(tmp_path / "run", break_off_after=5, **job)
    result = run(tmp_path / "run", resume=True, **job)
    assert (result.status, result.resumed_from_step) == ("completed", 4)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS_RELATIVE)
    assert result.backend.optimizer.endswith(", paged") == (optimizer == "paged_adamw_8bit")


def test_out_of_memory_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once ask the card for 32 TiB more, and half of them do not."""
    from fasttune.core.trainer import MeasuredTrainer

    plain, asked = MeasuredTrainer._micro_step, []

    def hungry(self: Any, model: Any, batch: dict[str, Any], learned: Any) -> Any:
        if len(batch["input_ids"]) == 16:
            asked.append(torch.empty(1 << 45, dtype=torch.uint8, device="cuda"))
        return plain(self, model, batch, learned)

    run(tmp_path / "whole", packing=False, micro_batch_rows=8)
    monkeypatch.setattr(MeasuredTrainer, "_micro_step", hungry)
    result = run(tmp_path / "run", packing=False, micro_batch_rows=16)
    assert result.status == "completed" and not asked
    assert any(warning.startswith("out of memory at step 1: from here on ") for warning in result.warnings)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=LOSS_RELATIVE)
