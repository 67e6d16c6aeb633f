"""What several GPUs bring: planned before a run, and measured by `fasttune bench --gpus`."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import config, terminal
from fasttune.bench import page, scaling
from fasttune.errors import FasttuneError
from fasttune.tools import plan
from tests.test_bench_page import make_arm, make_bench, shown

ASKED = {
    "model": {"name": "builtin:smollm2-135m", "max_length": 512},
    "data": {"train": "builtin:arithmetic", "max_rows": 400},
    "train": {"batch_rows": 64, "method": "lora"},
}


@pytest.mark.usefixtures("unsloth")
def test_a_plan_for_two_machines_says_what_they_exchange_and_what_is_left_of_their_speed() -> None:
    reporter = terminal.Reporter(quiet=True)
    one = plan.look(config.parse(ASKED), "h100-80", reporter)
    many = plan.look(config.parse(ASKED), "h100-80", reporter, ranks=16, nodes=2)
    found = many.scaling
    assert one.scaling is None and found is not None and (found.ranks, found.nodes) == (16, 2)
    adapter = one.forecast.memory_gib.adapter * 2**30  # fp32, as its gradients
    assert found.exchanged_mb == pytest.approx(2 * 15 / 16 * adapter / 1e6, rel=0.01)
    assert 0.9 <= found.tokens_a_rank / found.most_tokens <= 1
    cable, shared = found.exchange_ms.values()
    assert shared > cable > 0 and all(0 < share < 1 for share in found.efficiency.values() if share is not None)
    assert many.usd_per_hour == pytest.approx(16 * (one.usd_per_hour or 0)), "dollars are those of all"
    assert (many.forecast.steps, many.forecast.tokens) == (one.forecast.steps, one.forecast.tokens), "the same run"


def test_what_is_compared_is_said_with_its_efficiency() -> None:
    arms = [make_arm("1 process", 98, 99, 100, 101, 102), make_arm("2 processes", 148, 149, 150, 151, 152)]
    arms[1].processes = 2
    bench = make_bench(*arms, baseline="1 process", fastest="2 processes", limit=None)
    assert bench.efficiency(arms[0]) == 1 and bench.efficiency(arms[1]) == pytest.approx(0.75)
    assert "1.50× that of 1 process" in page.quote(bench) and "an efficiency of 75" in page.quote(bench)
    text = shown(bench)
    assert "efficiency" in text and "Hugging Face" not in text
    assert bench.as_dict()["arms"][1]["efficiency"] == pytest.approx(0.75)
    wrong = dataclasses.replace(arms[1], repeats=make_arm("x", 150, losses=[9.0] * 4).repeats)
    assert not make_bench(arms[0], wrong, baseline="1 process", fastest="2 processes").valid


@pytest.mark.parametrize("asked", ["2", "2,1", "1,1"])
def test_numbers_to_compare(asked: str) -> None:
    with pytest.raises(FasttuneError, match="two numbers or more, the smallest first"):
        scaling.arms(asked, on_gpus=False)


@pytest.mark.nightly
def test_two_processes_are_measured_beside_one(tmp_path: Path) -> None:
    tree = ASKED | {"model": {"name": "builtin:tiny"}, "train": {"batch_rows": 8}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    command = [sys.executable, "-m", "fasttune.cli", "bench", str(tmp_path / "c.yaml"), "--gpus", "1,2"]
    options = ["--repeats", "1", "--steps", "3", "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [arm["name"] for arm in document["arms"]] == ["1 process", "2 processes"] and document["valid"]
    assert document["arms"][1]["efficiency"] > 0 and document["arms"][1]["repeats"][0]["straggler"] >= 1
