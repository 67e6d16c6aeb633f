"""Where a step's time goes: the FLOPs are those of MFU, and the times those of the step that was profiled."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fasttune import chips, cli, config, hardware, settings
from fasttune.core import autoconfig, memory as memory_forecast, pretrained
from fasttune.core.memory import Shape, Workload
from fasttune.metrics import Roofline
from fasttune.tools import estimate, roofline

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B = Shape(
    layers=32, hidden=4096, mlp=14336, heads=32, query_width=4096, key_width=1024, vocab=128256, tied=False
)
STEP = estimate.Sample(1, 4, 16384, 16380, 16384, [Workload(8192, 8190, 0, 0)] * 2, one_length=True)
H100 = chips.with_gpu(hardware.detect(), "h100-80")


def table(train: dict[str, Any], gpu: hardware.Hardware = H100, sample: estimate.Sample = STEP) -> Roofline | None:
    tree: dict[str, Any] = {"model": {"name": "a/b", "max_length": 4096}, "data": {"train": "a/c"}, "train": train}
    asked = config.parse(tree)
    chosen = autoconfig.resolve(asked, gpu, LLAMA_8B)
    memory = memory_forecast.forecast(asked, LLAMA_8B, chosen, sample.micro_batches[0])
    return roofline.of_step(asked, chosen, sample, memory, gpu.gpus[0].name)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_flops_are_those_of_mfu_and_what_is_computed_again(method: str, policy: str) -> None:
    found = table({"method": method, "gradient_checkpointing": policy})
    assert found is not None
    adapter = 0 if method == "full" else LLAMA_8B.adapter_weights(16, list(settings.SEVEN_PROJECTIONS))
    once = LLAMA_8B.flops(method == "full", adapter)
    expected = once.of_step(STEP.tokens, STEP.labels, STEP.tokens / STEP.rows)
    if policy == "full":  # the forward of all layers: two FLOPs a weight, and a third of attention's
        expected += STEP.tokens * (2 * (LLAMA_8B.linear_weights + adapter) + once.attention * 4096 / 3)
    assert sum(group.flops for group in found.groups) == pytest.approx(expected, rel=1e-9)
    assert sum(group.ms for group in found.groups) == pytest.approx(found.ms)


def test_times_are_those_of_the_step_that_was_profiled() -> None:
    """Of an H100, two micro-batches of two rows of 4096; the rates were chosen on it, the bytes are counted."""
    profile = json.loads((ROOT / "benchmarks" / "results" / "profile-lora-r16-4096.json").read_text())
    measured = profile["groups_ms"]
    found = table({})
    assert found is not None
    ms = {group.name: group.ms for group in found.groups}
    matmuls = ms["matmuls forward"] + ms["matmuls backward"] + ms["head"] + ms["LoRA"]
    assert matmuls == pytest.approx(measured["matmul"], rel=0.05)
    assert ms["attention"] == pytest.approx(measured["attention"], rel=0.05)
    assert ms["elementwise"] == pytest.approx(measured["compiled blocks"] + measured["norm, rope, swiglu"], rel=0.1)
    assert found.ms == pytest.approx(1e3 * profile["steps"][-1]["seconds"], rel=0.03)


def test_no_table_where_rates_are_not_known() -> None:
    assert table({}, chips.with_gpu(hardware.detect(), "l4-24")) is None
    faster, slower = table({}, chips.with_gpu(hardware.detect(), "h200-141")), table({})
    assert faster is not None and slower is not None
    assert 1 < faster.tokens_per_s / slower.tokens_per_s < 4.8 / 3.35  # only what memory bounds


def test_where_launches_take_longer_they_decide() -> None:
    """As the forecast of the speed has it; of few tokens at a time the kernels wait for the CPU."""
    few = estimate.Sample(1, 8, 512, 504, 512, [Workload(64, 63, 0, 0)] * 8, one_length=True)
    found = table({"method": "lora"}, sample=few)
    assert found is not None and found.ms == pytest.approx(8 * 32 * 1e3 * estimate.LAUNCH_S_A_LAYER.expected)
    assert sum(each.ms for each in found.groups) == pytest.approx(found.ms)
    assert found.tokens_per_s == pytest.approx(512 / found.ms * 1e3)


def test_plan_shows_it_and_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(estimate, "on_file", list)
    import inputs

    model = tmp_path / "llama"
    shutil.copytree(pretrained.builtin("builtin:tiny"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "config.json").write_text(json.dumps(inputs.LLAMA_31_8B))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x" * 1023}) + "\n")
    command = ["plan", str(ROOT / "benchmarks" / "battery.yaml"), f"model.name={model}", "model.max_length=1024"]
    command += [f"data.train={tmp_path / 'rows.jsonl'}", "train.batch_rows=1", "train.micro_batch_rows=1", "--json"]
    assert cli.main([*command, "--gpu", "h100-80"]) == 0
    told = capsys.readouterr()
    expected = json.loads(told.out)["forecast"]
    groups = {group["name"]: group for group in expected["roofline"]["groups"]}
    assert groups["matmuls forward"]["bound"] == "matmul" and groups["LoRA"]["bound"] == "memory"
    assert "kernels of a step" in told.err and "bound by" in told.err
    assert expected["tokens_per_s"]["expected"] == pytest.approx(expected["roofline"]["tokens_per_s"])
    assert cli.main([*command, "--gpu", "l4-24"]) in (0, 1)
    told = capsys.readouterr()
    assert json.loads(told.out)["forecast"]["roofline"] is None and "bound by" not in told.err
