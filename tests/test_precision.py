"""Full fine-tuning in bf16 learns what it learns in fp32: no small update is rounded away."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import losses, run

from fasttune.core.memory import Choices

# By night: tests/golden/ holds the same kinds of run to the bit.
pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("unsloth")]

SMALL = {"method": "full", "scheduler": "constant", "warmup_ratio": 0.0, "max_steps": 24, "learning_rate": 2e-5}
KINDS = {"fp32 weights": {}, "rounded by chance": {"optimizer": "adamw_8bit"}}


def fall(folder: Path, dtype: str = "bfloat16", **train: Any) -> tuple[float, Any]:
    """How far the loss fell at the usual learning rate, the mean over all steps, and what ran."""
    changes = {"model": {"dtype": dtype}, "data": {"max_rows": 8}, "checkpoint": {"every": "never"}}
    result = run(folder, changes | {"train": SMALL | train})
    assert result.status == "completed", result.error
    first, *later = losses(folder)
    return first - sum(later) / max(len(later), 1), result


@pytest.fixture(scope="module")
def exact(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> float:
    return fall(tmp_path_factory.mktemp("exact") / "run", "float32")[0]


@pytest.fixture
def native_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast on a CPU that Unsloth would spare it, as it is on a GPU."""
    monkeypatch.setattr("unsloth_zoo.cpu.trainer.cpu_bf16_supported", lambda: True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_as_it_does_in_fp32(tmp_path: Path, exact: float, native_bf16: None, kind: str) -> None:
    from safetensors.torch import load_file

    from fasttune.core import pretrained

    found, result = fall(tmp_path / "run", **KINDS[kind])
    assert found > 0.95 * exact
    backend = json.loads((tmp_path / "run" / "run.json").read_text())["backend"]
    settings = {setting.name: setting for setting in result.settings}
    assert settings["trained weights"].reason
    if kind == "fp32 weights":
        assert backend["dtype"] == "float32 trained, bf16 autocast"
        assert backend["optimizer"] == "torch AdamW, moments float32"
    else:
        assert backend["dtype"] == "bfloat16 trained, bf16 autocast"
        assert backend["optimizer"] == "torchao AdamW8bit, moments 8 bit/bfloat16, bf16 rounded by chance"
    assert backend["packing"].startswith("packed")
    assert not [warning for warning in result.warnings if "replaced" in warning]
    model = tmp_path / "run" / "model"
    saved = load_file(model / "model.safetensors")
    base = load_file(pretrained.builtin("builtin:tiny") / "model.safetensors")
    assert saved.keys() == base.keys(), "no tied weight is there twice"
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.bfloat16"}
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"


def test_plain_bf16_would_not(tmp_path: Path, exact: float, native_bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail."""
    monkeypatch.setattr(Choices, "fp32_masters", False)
    assert fall(tmp_path / "run")[0] < 0.6 * exact
