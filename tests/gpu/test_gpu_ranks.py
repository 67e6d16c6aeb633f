"""Two GPUs train as one does: the real command, NCCL, and a GPU for each process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fasttune import gpus

CARDS = sum(map(len, gpus.read()[0]))
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(CARDS < 2, reason="needs two NVIDIA GPUs")]

LOSS_RELATIVE = 5e-3  # bf16, and kernels that add in no fixed order


def run(folder: Path, processes: int, method: str, divided: bool = False) -> tuple[dict[str, Any], list[float]]:
    tree = {
        "name": "ranks",
        "model": {"name": "builtin:tiny", "max_length": 512},
        "data": {"train": "builtin:arithmetic", "max_rows": 64, "eval_share": 0.2},
        "train": {"method": method, "batch_rows": 12, "max_steps": 8, "learning_rate": 1e-3},
        "eval": {"rows": 8, "problems": 0},
        "output_dir": str(folder),
    }
    folder.with_suffix(".yaml").write_text(json.dumps(tree))
    command = [
        sys.executable,
        "-m",
        "fasttune.cli",
        "train",
        str(folder.with_suffix(".yaml")),
        "--gpus",
        str(processes),
    ]
    environment = os.environ | {"UNSLOTH_FSDP2": str(int(divided))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "run.json").read_text()), [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_gpus_train_as_one(tmp_path: Path, method: str) -> None:
    one, alone = run(tmp_path / "one", 1, method)
    two, both = run(tmp_path / "two", 2, method)
    assert both == pytest.approx(alone, rel=LOSS_RELATIVE)
    assert two["ranks"]["ranks"] == 2 and len(two["ranks"]["peak_memory_gib"]) == 2
    assert two["held_out"]["after"]["loss"] == pytest.approx(one["held_out"]["after"]["loss"], rel=LOSS_RELATIVE)
    assert two["backend"]["patched_layers"] == one["backend"]["patched_layers"], "Unsloth's kernels run in both"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_divided_among_two_gpus_trains_as_a_whole_one(tmp_path: Path, method: str) -> None:
    _, alone = run(tmp_path / "one", 1, method)
    two, both = run(tmp_path / "two", 2, method, divided=True)
    assert both == pytest.approx(alone, rel=LOSS_RELATIVE)
    assert any("2 parts" in setting["value"] for setting in two["settings"])
