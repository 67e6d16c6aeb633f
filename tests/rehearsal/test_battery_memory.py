"""Every arm of every benchmark stage of the battery fits into the memory of an H100, at the real size of its model.

Plain arms: the real code on fake tensors (fake_memory.py). Arms of Unsloth: fasttune's own forecast. Shapes are those
of the stage's own rows, encoded and laid out as its command would; nothing of a stage is written here a second time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import inputs  # noqa: E402
from stages import STAGES  # noqa: E402

from fasttune import chips, cli, config as configuration, hardware  # noqa: E402
from fasttune.bench import arms, run  # noqa: E402
from fasttune.config import Config  # noqa: E402
from fasttune.core import autoconfig, memory as memory_forecast, pretrained  # noqa: E402
from fasttune.core.memory import Shape, Workload  # noqa: E402
from fasttune.data import load  # noqa: E402
from fasttune.tools import estimate  # noqa: E402

Case = tuple[str, str]  # of fake_memory.py: a config, and what is computed at once

# Of a card's memory; the rest is for the CUDA context, workspaces of cuBLAS, and fragments.
LIMITS_GIB = {"h100-80": 74.0, "h200-141": 131.0}
BENCHES = [stage for stage in STAGES if " bench " in stage.command]
MEASURED_ON, MEASURED_WITHIN = "h100-80", 0.06
FULL_ROWS = 8192  # tokens at once of our arm where rows are full
pytestmark = pytest.mark.slow


def machine(gpu: str) -> hardware.Hardware:
    return chips.with_gpu(hardware.Hardware("linux", "x86_64", "2.39", "3.12.3", "a CPU", 16, 128, 100), gpu)


class Job:
    """A benchmark's job and its rows."""

    def __init__(self, config: Config, names: list[str], steps: int) -> None:
        self.config, self.arms, self.steps = config, names, steps
        self.at_once = arms.rows_at_once(config)
        self.shape = Shape.of(pretrained.read_architecture(config.model))
        tokenizer = pretrained.read_tokenizer(config.model)
        self.data = load.encode(config, tokenizer, config.train.packing is not False, lambda *_: None)

    def rectangles(self, at_once: int) -> set[tuple[int, int, bool]]:
        """(rows, length, whether one is padded) of what a trainer computes that takes so many rows as they come."""
        found = set()
        for step in range(self.steps):
            lengths = [len(self.data.parts[part].row(row)[0]) for part, row in self.data.rows_of(step)]
            for group in (lengths[at : at + at_once] for at in range(0, len(lengths), at_once)):
                found.add((len(group), max(group), min(group) != max(group)))
        return found

    def plan(self, gpu: str) -> autoconfig.Plan:
        return autoconfig.resolve(self.config, machine(gpu), self.shape)

    def plain(self, arm: str, at_once: int, gpu: str) -> Case:
        """What fake_memory.py takes: the largest micro-batch of a plain arm, which has bf16 weights, and the optimizer
        that is planned, as every arm has it."""
        rows, length, masked = max(self.rectangles(at_once), key=lambda each: each[0] * each[1])
        memory = memory_forecast.forecast(self.config, self.shape, self.plan(gpu), Workload(1, 1, 0, 0))
        assert memory.weights * 2**30 == pytest.approx(2 * self.shape.parameters), "fake_memory.py has bf16 weights"
        case = {"rows": rows, "length": length, "masked": masked, "tuned": arm == "hf-tuned"}
        return configuration.dump(self.config), json.dumps(case | {"optimizer_gib": round(memory.optimizer, 3)})

    def unsloth_gib(self, arm: str, gpu: str) -> float:
        """fasttune's forecast; Unsloth as in its examples pads at worst, and recomputes."""
        chosen, data = self.plan(gpu), replace(self.data)
        if chosen.packed:
            chosen, _ = autoconfig.share(self.config, machine(gpu), chosen, data, False)
        batches = estimate.lay_out(data, self.steps).micro_batches
        if arm == "unsloth-notebook":
            chosen = replace(chosen, gradient_checkpointing="unsloth", packed=False)
            batches = [Workload(rows * n, rows * n, 0, 0) for rows, n, _ in self.rectangles(self.at_once)]
        return max(memory_forecast.forecast(self.config, self.shape, chosen, each).total for each in set(batches))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The battery's rows, and its model without weights."""
    folder = tmp_path_factory.mktemp("battery")
    inputs.write_rows(folder)
    tiny, weights = pretrained.builtin("builtin:tiny"), shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny, folder / "model", ignore=weights)
    (folder / "model" / "config.json").write_text(json.dumps(inputs.LLAMA_31_8B))
    return {"python": "python", "out": "out", "rows": str(folder), "model": str(folder / "model")}


@pytest.fixture(scope="module")
def jobs(places: dict[str, str]) -> dict[str, Job]:
    """Of every stage: its command, read as `fasttune bench` reads it."""
    found = {}
    for stage in BENCHES:
        _, command = stage.command.format(**places, stage=stage.name).split("fasttune.cli ")
        options, rest = cli.parser().parse_known_args(command.split())
        asked = configuration.load(ROOT / options.config, [*options.overrides, *rest])
        found[stage.name] = Job(
            asked, run.checked_arms(asked, options.arms, options.repeats, options.steps), options.steps
        )
    return found


@pytest.fixture(scope="module")
def measured(places: dict[str, str]) -> list[tuple[str, Job, dict[str, Any]]]:
    """(arm, job, row) of every arm of the battery that ran on a GPU and whose peak is on file."""
    found = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if row["benchmark"] != "bench" or not row["hardware"]["gpus"] or "model-8b" not in row["model"]:
                continue
            tree = row["settings"]
            for section, key in (("model", "name"), ("data", "train")):
                where = places["model"] if key == "name" else f"{places['rows']}/{tree['data']['train']}"
                tree = tree | {section: tree[section] | {key: where}}
            job = Job(configuration.parse(tree), [arm["name"] for arm in row["arms"]], row["steps"])
            found += [(arm["name"], job, arm) for arm in row["arms"] if arm["peak_memory_gib"]]
    assert found
    return found


@pytest.fixture(scope="module")
def plain_gib(jobs: dict[str, Job], measured: list[Any]) -> dict[Case, float]:
    """The peak of every plain arm: some stages share one."""
    named = [(job, arm) for job in jobs.values() for arm in job.arms if arm in arms.PLAIN]
    cases = {job.plain(arm, job.at_once, gpu) for job, arm in named for gpu in LIMITS_GIB}
    cases |= {job.plain(arm, ran_at_once(job, row), MEASURED_ON) for arm, job, row in measured if arm in arms.PLAIN}
    ordered = sorted(cases)
    given = json.dumps([(text, json.loads(shape)) for text, shape in ordered])
    command = [sys.executable, str(Path(__file__).parent / "fake_memory.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(ordered, json.loads(done.stdout.splitlines()[-1]), strict=True))


def ran_at_once(job: Job, arm: dict[str, Any]) -> int:
    """Rows at once of an arm that is on file; one that ran out of memory says how many it had."""
    fewer = re.search(r"(\d+) at once:", arm["backend"]["packing"])
    return int(fewer[1]) if fewer else job.at_once


@pytest.mark.parametrize("name", [stage.name for stage in BENCHES])
@pytest.mark.parametrize("gpu", LIMITS_GIB)
def test_every_arm_of_unsloth_fits(name: str, gpu: str, jobs: dict[str, Job]) -> None:
    for arm in set(jobs[name].arms) - set(arms.PLAIN):
        assert jobs[name].unsloth_gib(arm, gpu) < LIMITS_GIB[gpu], arm


@pytest.mark.nightly  # a minute
@pytest.mark.parametrize("name", [stage.name for stage in BENCHES])
@pytest.mark.parametrize("gpu", LIMITS_GIB)
def test_every_plain_arm_fits(name: str, gpu: str, jobs: dict[str, Job], plain_gib: dict[Case, float]) -> None:
    job = jobs[name]
    for arm in set(job.arms) & set(arms.PLAIN):
        assert plain_gib[job.plain(arm, job.at_once, gpu)] < LIMITS_GIB[gpu], arm


def test_full_rows_fill_a_pack_to_the_last_token(jobs: dict[str, Job]) -> None:
    """A row one token longer, and every other pack would be half empty."""
    for name in ("lora-r16-4096", "lora-r16-1024"):
        sizes = {each.tokens for each in estimate.lay_out(jobs[name].data, jobs[name].steps).micro_batches}
        assert sizes == {FULL_ROWS}


def test_peaks_are_those_that_were_measured(measured: list[Any]) -> None:
    ours = [(arm, job, row) for arm, job, row in measured if arm not in arms.PLAIN]
    assert ours
    for arm, job, row in ours:
        for gib in row["peak_memory_gib"]:
            assert job.unsloth_gib(arm, MEASURED_ON) == pytest.approx(gib, rel=MEASURED_WITHIN), arm


@pytest.mark.nightly
def test_peaks_of_plain_arms_are_those_that_were_measured(measured: list[Any], plain_gib: dict[Case, float]) -> None:
    for arm, job, row in measured:
        if arm in arms.PLAIN:
            peak = plain_gib[job.plain(arm, ran_at_once(job, row), MEASURED_ON)]
            for gib in row["peak_memory_gib"]:
                assert peak == pytest.approx(gib, rel=MEASURED_WITHIN), f"{arm}: {row['backend']['packing']}"
