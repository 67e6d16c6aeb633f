"""`fasttune bench`: what is compared is the same work, what is not is INVALID, and an interrupted one goes on."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import goldens
import numpy as np
import pytest

from fasttune import config
from fasttune.bench import run, stats
from fasttune.bench.stats import Arm, Repeat
from fasttune.errors import FasttuneError, OutputError
from fasttune.metrics import Backend
from tests.test_bench_page import make_bench, make_repeat as repeat

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 256},
    "data": {"train": "builtin:arithmetic", "max_rows": 64, "eval": "builtin:arithmetic"},
    "eval": {"problems": 2},  # nothing that an arm does
    "train": {"batch_rows": 4, "learning_rate": 1e-2},
}
STEPS = 3


def test_the_first_step_is_left_out_of_a_speed() -> None:
    assert repeat(50.0).tokens_per_s == 50.0
    assert repeat(50.0).loss_tokens_per_s == 20.0
    assert repeat(padding_tokens=[100] * 4).padding_fraction == 0.5


def test_the_ratio_is_of_medians_and_its_interval_holds_it() -> None:
    fast = Arm("fasttune", "", [repeat(s) for s in (180, 200, 190, 210, 195)])
    slow = Arm("vanilla", "", [repeat(s) for s in (100, 104, 98, 101, 99)])
    found = stats.compare(fast, slow, 1e-3)
    assert found.ratio == pytest.approx(195 / 100)
    assert 180 / 104 <= found.low < found.ratio < found.high <= 210 / 98
    assert stats.compare(fast, slow, 1e-3) == found, "seeded"
    assert found.invalid is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"losses": [2.0, 1.5, 1.25, 0.994]}, "losses differ by 0.6%"),
        ({"losses": [2.0, 1.5, 1.25, float("nan")]}, "a loss is not finite"),
        ({"rows_digest": "other"}, "saw different rows"),
        ({"weights_digest": "other"}, "began with different weights"),
        ({"tokens": [130] * 4}, "count tokens differently"),
        ({"loss_tokens": [61] * 4}, "count tokens differently"),
    ],
)
def test_other_work_is_invalid(changes: dict[str, Any], told: str) -> None:
    good, bad = (
        Arm("vanilla", "", [repeat(), repeat()]),
        Arm("fasttune", "", [repeat(), repeat(**changes)]),
    )
    assert told in (stats.compare(bad, good, 1e-3).invalid or "")


def test_fasttune_is_compared_with_all_and_all_with_the_baseline() -> None:
    arms = [Arm(name, "", [repeat()]) for name in ("fasttune", "vanilla", "hf-tuned")]
    arms.append(Arm("unsloth-notebook", "", [], "out of memory"))
    bench = make_bench(*arms, usd_per_hour=3.6)
    pairs = [(c.arm, c.over) for c in bench.comparisons]
    assert sorted(pairs) == [("fasttune", "hf-tuned"), ("fasttune", "vanilla"), ("hf-tuned", "vanilla")]
    document = bench.as_dict()
    assert document["arms"][0]["tokens_per_s"]["median"] == 100.0
    assert document["arms"][0]["usd_per_million_tokens"] == pytest.approx(3.6 / 3600 / 100 * 1e6)
    assert document["arms"][3]["failure"] == "out of memory"
    json.dumps(document)


@pytest.fixture(scope="module")
def shared(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `share` writes for the tiny job, made in this process."""
    from fasttune.bench import worker

    folder = tmp_path_factory.mktemp("shared")
    settings = config.parse(TREE | {"train": TREE["train"] | {"max_steps": STEPS}})
    facts = worker.share(settings, folder, folder)
    assert facts["full_steps_per_epoch"] == 64 // 4
    return folder


def measure(arm: str, shared: Path, scratch: Path, **train: Any) -> Repeat:
    from fasttune.bench import worker

    settings = config.load(shared / "config.yaml")
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=train)})
    return worker.measure(arm, settings, STEPS, shared, scratch)


def test_a_plain_arm_is_built_without_unsloth(shared: Path, tmp_path: Path) -> None:
    """In a process of its own, as `fasttune bench` runs it."""
    code = (
        "import sys, pathlib; from fasttune import config; from fasttune.bench import arms, worker\n"
        "here = pathlib.Path(sys.argv[1]); settings = config.load(here / 'config.yaml')\n"
        "arms.build('hf-tuned', settings, 2, here, pathlib.Path(sys.argv[2]))\n"
        "print('transformers' in sys.modules, 'unsloth' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(shared), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "False"]


def test_an_arm_out_of_memory_begins_anew_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune.bench import worker

    asked = []

    def once(arm: str, now: config.Config, *_: Any) -> Repeat:
        asked.append(now.train.micro_batch_rows)
        if now.train.micro_batch_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return repeat(backend=Backend("peft", "sdpa", "padded", 0, "none", "bfloat16"))

    monkeypatch.setattr(worker, "measure_once", once)
    job = config.parse(TREE | {"train": {"batch_rows": 6, "micro_batch_rows": 6}})
    found = worker.measure("vanilla", job, 2, Path(), Path())
    assert asked == [6, 3, 2]
    assert found.backend.packing == "padded, 2 at once: 6 ran out of memory"
    with pytest.raises(torch.OutOfMemoryError):  # by itself it does less at once already
        worker.measure("fasttune", job, 2, Path(), Path())
    assert asked == [6, 3, 2, 6]


def test_the_limit_is_measured_at_the_micro_batch_of_most_tokens() -> None:
    from fasttune.bench import worker
    from fasttune.data.sharing import padded

    def row(length: int) -> tuple[Any, Any]:
        return np.full(length, 5, np.int32), np.arange(length) >= length - 4

    made = [padded([row(90), row(80)], 0), padded([row(10), row(20)], 0)]  # 2 × 90 and 2 × 20
    data: Any = SimpleNamespace(least_shared=8, micro_batches=lambda step: made)
    assert worker.at_once(data, 3) == (round((180 * 180 + 40 * 40) / 220), 8)
    assert not data.least_shared, "the limit is that of computing every token"


def test_peak_memory_is_that_of_the_steps(shared: Path, tmp_path: Path, gpu_memory: Any) -> None:
    """And what took more before them is said, for it decides what fits."""
    gpu_memory.takes(60.0)
    arm = Arm("vanilla", "", [measure("vanilla", shared, tmp_path)])
    assert [(each.peak_memory_gib, each.peak_before_gib) for each in arm.repeats] == [(1.0, 60.0)]
    assert arm.larger_before_gib == 60.0
    assert Arm("vanilla", "", [repeat(peak_memory_gib=60.5, peak_before_gib=60.0)]).larger_before_gib is None


def compared(one: Repeat, other: Repeat) -> str | None:
    return stats.compare(Arm("a", "", [one]), Arm("b", "", [other]), stats.LOSS_TOLERANCE["float32"]).invalid


@pytest.fixture(scope="module")
def vanilla(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Repeat:
    return measure("vanilla", shared, tmp_path_factory.mktemp("vanilla"))


@pytest.mark.parametrize("arm", ["fasttune", "hf-tuned", "unsloth-notebook"])
def test_every_arm_does_the_work_of_the_baseline(vanilla: Repeat, shared: Path, tmp_path: Path, arm: str) -> None:
    other = measure(arm, shared, tmp_path)
    assert compared(other, vanilla) is None
    assert len(other.losses) == len(other.seconds) == STEPS
    assert (sum(other.padding_tokens) == 0) is (arm != "unsloth-notebook")
    shared = 1 - sum(other.computed_tokens) / sum(other.tokens)
    assert (shared > 0) is (arm == "fasttune")
    assert vanilla.flops_per_token and other.flops_per_token
    assert other.flops_per_token == pytest.approx(vanilla.flops_per_token, rel=1e-6 + shared), "of what is computed"


def test_the_notebook_arm_has_what_a_usual_install_has(
    unsloth: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xformers, which our model.py hides from Unsloth, is imported before it; the row says where it is not there."""
    from fasttune import core
    from fasttune.bench import arms

    (tmp_path / "xformers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)

    def load(*_: object) -> None:
        assert sys.modules["xformers"].__file__ == str(tmp_path / "xformers.py")
        raise LookupError("far enough")

    monkeypatch.setattr(core.model, "load", load)
    with pytest.raises(LookupError, match="far enough"):
        arms.build("unsloth-notebook", config.parse({**TREE, "output_dir": str(tmp_path)}), STEPS, tmp_path, tmp_path)
    monkeypatch.delitem(sys.modules, "xformers")
    assert arms.unsloth_library(["xformers"]) == "unsloth + trl + xformers"
    assert "without xformers or flash-attn" in arms.unsloth_library([])


@pytest.mark.parametrize(
    ("optimizer", "trained", "ran"),
    [
        ("adamw_torch_fused", "float32 trained", "torch AdamW, moments float32"),
        ("adamw_8bit", "bfloat16 trained", "torchao AdamW8bit, moments 8 bit/bfloat16, bf16 rounded by chance"),
    ],
)
def test_full_fine_tuning_in_bf16_is_the_same_mathematics_in_every_arm(
    unsloth: None, tmp_path: Path, optimizer: str, trained: str, ran: str
) -> None:
    from fasttune.bench import worker

    train = TREE["train"] | {"max_steps": STEPS, "method": "full", "optimizer": optimizer, "learning_rate": 1e-3}
    settings = config.parse(TREE | {"model": TREE["model"] | {"dtype": "bfloat16"}, "train": train})
    worker.share(settings, tmp_path, tmp_path)
    settings = config.load(tmp_path / "config.yaml")
    found = [
        worker.measure(arm, settings, STEPS, tmp_path, tmp_path) for arm in ("fasttune", "vanilla", "unsloth-notebook")
    ]
    for each in found:
        assert each.backend.optimizer == ran and each.backend.dtype.startswith(trained)
        told = stats.compare(Arm("a", "", [each]), Arm("b", "", [found[0]]), stats.LOSS_TOLERANCE["bfloat16"])
        assert told.invalid is None


def test_an_arm_of_other_weights_is_invalid(vanilla: Repeat, shared: Path, tmp_path: Path) -> None:
    """By so little that no loss tells."""
    import safetensors.torch

    from fasttune.bench import worker
    from fasttune.core import pretrained

    other = Path(shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "other"))
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1 + 1e-6
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    settings = config.load(shared / "config.yaml", [f"model.name={other}"])
    found = compared(worker.measure("vanilla", settings, STEPS, shared, tmp_path), vanilla)
    assert found == "they began with different weights"


def test_weights_are_the_same_in_another_dtype_and_not_as_bytes(unsloth: None) -> None:
    import torch

    from fasttune.core import what_ran

    layer = torch.nn.Linear(64, 64).bfloat16()
    before = what_ran.fingerprint(layer.parameters())
    assert what_ran.fingerprint(layer.float().parameters()) == before
    packed = torch.nn.Module()
    packed.weight = torch.nn.Parameter(torch.zeros(2048, 1, dtype=torch.uint8), requires_grad=False)
    assert what_ran.fingerprint(packed.parameters()) != before


def test_plain_arms_load_the_revision_and_the_code_of_the_config(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from fasttune.bench import worker

    settings = config.load(shared / "config.yaml", ["model.revision=abc", "model.trust_remote_code=true"])
    asked: list[dict[str, Any]] = []

    def load(source: str, **more: Any) -> None:
        asked.append(more)
        if len(asked) == 2:
            raise StopIteration

    for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", load)
    with pytest.raises(StopIteration):
        worker.measure("vanilla", settings, STEPS, shared, tmp_path)
    assert [(each["revision"], each["trust_remote_code"]) for each in asked] == [("abc", True)] * 2


def test_labels_shifted_by_one_are_invalid(
    vanilla: Repeat, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune.bench import arms

    rows = arms._rows(shared)
    shifted = [row | {"labels": [*row["labels"][1:], -100]} for row in rows]
    monkeypatch.setattr(arms, "_rows", lambda folder: shifted)
    broken = measure("vanilla", shared, tmp_path)
    assert "different rows" in (compared(broken, vanilla) or "")
    seen_alike = replace(broken, rows_digest=vanilla.rows_digest, loss_tokens=vanilla.loss_tokens)
    assert "losses differ" in (compared(seen_alike, vanilla) or ""), "the losses alone show it too"


def test_an_arm_that_counts_padding_is_invalid(
    vanilla: Repeat, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune.core import what_ran

    honest = what_ran.count_tokens

    def padded(batches: list[dict[str, Any]]) -> dict[str, int]:
        counts = honest(batches)
        return counts | {"tokens": counts["tokens"] + counts["padding_tokens"]}

    monkeypatch.setattr(what_ran, "count_tokens", padded)
    assert "count tokens differently" in (compared(measure("vanilla", shared, tmp_path), vanilla) or "")


@pytest.mark.parametrize(
    ("settings", "asked", "told"),
    [
        ([], {"arms": "vanila"}, "--arms: vanila unknown"),
        ([], {"repeats": 0}, "--repeats 0"),
        ([], {"steps": 1}, "--steps 1: at least 2"),
        (["lora.dropout=0.1"], {}, "add lora.dropout=0"),
        (["lora.init=pissa"], {}, "add lora.init=default"),
        (["model.quantization=nf4"], {}, "add model.quantization=none"),
        (["data.layout=concat", "samples=0", "eval=null"], {}, "add data.cross_document=true, or --arms fasttune"),
        (["data.train=nowhere.jsonl"], {}, "no file nowhere.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, settings: list[str], asked: Any, told: str) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(TREE))
    with pytest.raises(FasttuneError, match=re.escape(told)):
        run.checked_arms(
            config.load(tmp_path / "tiny.yaml", settings), **{"arms": None, "repeats": 1, "steps": None} | asked
        )


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(TREE))
    whole = [sys.executable, "-m", "fasttune.cli", "bench", str(file), "--output", str(folder / "out"), *arguments]
    secrets = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), CANARY)
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=os.environ | secrets)


CANARY = "hf_canary0123456789abcdefghijklmnop"


@pytest.mark.slow
def test_the_command_measures_shows_and_resumes(unsloth: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--arms", "fasttune,vanilla", "--steps", str(STEPS), "--usd-per-hour", "2.5", "--json"]
    done = command(tmp_path, *arguments, "--repeats", "1")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["valid"] and [arm["name"] for arm in document["arms"]] == ["fasttune", "vanilla"]
    assert "1 repeat, fewer than 5" in document["objections"]
    assert document["limit"]["tokens_per_s"] > 0
    assert document["arms"][0]["backend"]["packing"].startswith("packed")
    assert statistics.median(document["arms"][1]["tokens_per_s"]["values"]) > 0
    assert {"bench.json", "bench.html", "bench.png", "measurements.jsonl"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == document
    assert CANARY not in done.stdout + done.stderr, "a secret is printed"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), f"a secret is in {path}"
    goldens.contract("bench.json", document)
    kept = tmp_path / "out" / "measurements.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) == 1 + 3  # the job; fasttune, vanilla, limit
    kept.write_text("\n".join(lines[:3]) + "\n")  # interrupted before the limit
    from fasttune.bench import worker

    measured: list[str] = []

    def here(what: str, shared: Path, steps: int) -> dict[str, Any]:
        measured.append(what)
        if what == "share":
            return worker.share(config.load(shared / "job.yaml", ours=True), shared, shared)
        return {"tflops": 1.0, "shapes": {}}

    monkeypatch.setattr(run, "fresh_process", here)
    settings = config.parse(TREE | {"usd_per_hour": 2.5})
    run.run(settings, ["fasttune", "vanilla"], 1, STEPS, tmp_path / "out", "", lambda what, share: None)
    assert measured == ["share", "limit"] and kept.read_text().splitlines()[:3] == lines[:3]
    with pytest.raises(OutputError, match="measurements of another job"):
        run.run(settings, ["vanilla"], 1, STEPS + 1, tmp_path / "out", "", lambda what, share: None)
