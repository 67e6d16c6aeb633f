"""The benchmarks folder: what is quoted comes from the rows, no row is unfit, and the GPU battery runs on a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fasttune.metrics import Backend
from tests.test_bench_page import make_arm, make_bench

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def bench(**changes: Any) -> dict[str, Any]:
    """A bench.json with two arms of five repeats, fasttune twice as fast, and one arm that failed."""
    ran = Backend("unsloth", "aten::_flash_attention_forward", "packed", 2, "none", "float32 trained")
    same = {
        "tokens": [90] * 4,
        "computed_tokens": [90] * 4,
        "padding_tokens": [10] * 4,
        "backend": ran,
        "flops_per_token": 1e9,
    }
    losses = [2.0 + changes.pop("shift", 0.0)] * 4
    made = make_bench(
        make_arm("fasttune", *(100 / (0.5 + 0.001 * i) for i in range(5)), losses=losses, **same),
        make_arm("vanilla", *(100 / (1.0 + 0.002 * i) for i in range(5)), losses=[2.0] * 4, **same),
        make_arm("hf-tuned", failure="OutOfMemoryError: /home/me/models/llama needs more"),
        name="smollm2-135m-gsm8k",
        command="fasttune bench configs/smollm2_135m_gsm8k.yaml data.train=/home/me/gsm8k/train.jsonl",
        model="~/models/smollm2",
        date="2026-11-21",
    )
    return made.as_dict() | changes


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The three pages, and no results and rates yet."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "fasttune" / "tools").mkdir(parents=True)
    (tmp_path / "fasttune" / "tools" / "rates.json").write_text("[]\n")
    pages = {"README.md": "measured", "benchmarks/README.md": "results", "docs/recipes.md": "recipes"}
    for page, marker in pages.items():
        (tmp_path / page).write_text(f"before\n<!-- {marker} -->\n<!-- /{marker} -->\nafter\n")
    return tmp_path


def add(repository: Path, document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    path = repository / "bench.json"
    path.write_text(json.dumps(document))
    return script("add_result.py", path, "--results", repository / "benchmarks" / "results")


def test_what_is_quoted_is_what_the_rows_say() -> None:
    done = script("render.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_result_becomes_a_row_a_table_and_a_sentence(repository: Path) -> None:
    done = add(repository, bench())
    assert done.returncode == 0, done.stderr
    text = (repository / "benchmarks" / "results" / "smollm2-135m-gsm8k.jsonl").read_text()
    row = json.loads(text)
    assert row["arms"][0]["tokens_per_s"] == pytest.approx([90 / (0.5 + 0.001 * i) for i in range(5)])
    assert row["git"] == "abc1234" and row["comparisons"][0]["low"] <= 2.0 <= row["comparisons"][0]["high"]
    assert row["command"] == "fasttune bench configs/smollm2_135m_gsm8k.yaml data.train=train.jsonl"
    assert row["model"] == "smollm2" and row["arms"][2]["failure"] == "OutOfMemoryError: llama needs more"
    assert "/home" not in text and "disk_free" not in text

    assert script("render.py", "--check", "--root", repository).returncode == 1
    assert script("render.py", "--root", repository).returncode == 0
    assert script("render.py", "--check", "--root", repository).returncode == 0
    table = (repository / "benchmarks" / "README.md").read_text()
    assert "| fasttune | 179 (179 to 180, 5 repeats) | 2.00 (" in table and "| hf-tuned | failed: OutOfMemory" in table
    page = (repository / "README.md").read_text()
    line = next(line for line in page.splitlines() if "(benchmarks/results/smollm2-135m-gsm8k.jsonl)" in line)
    assert "| 179 | 89.6 |  | **2.00×** (" in line and line.endswith("| 45% |")
    assert "smollm2 on Some CPU (2 cores, no GPU), 5 repeats, 2026-11-21. Losses agree" in page
    assert "No speed has been measured on a GPU yet." in page
    assert page.startswith("before\n") and page.endswith("after\n")

    (repository / "README.md").write_text(page.replace("2.00×", "3.00×"))
    assert script("render.py", "--check", "--root", repository).returncode == 1


def test_rates_are_of_benchmarks_on_a_gpu_and_of_forecast_runs_on_a_cpu(repository: Path) -> None:
    rates = repository / "fasttune" / "tools" / "rates.json"
    add(repository, bench())
    assert script("render.py", "--root", repository).returncode == 0
    assert json.loads(rates.read_text()) == []  # a CPU's speed moves with its neighbours
    gpu = bench()["hardware"] | {"gpus": [{"name": "NVIDIA H200"}], "driver": "580"}
    document = bench(name="lora-4096", hardware=gpu, settings={"train": {"method": "full"}})
    assert add(repository, document).returncode == 0
    run = {"what": "x", "tokens": 9, "forecast_gib": 2.0, "measured_gib": 1.9, "forecast_s": 90.0, "measured_s": 100.0}
    run |= {"machine": "Some CPU, 2 cores", "dtype": "float32"}
    runs = [run | {"fitted": fitted, "share": share} for fitted, share in ((True, 0.6), (False, 0.1))]
    row = {"benchmark": "forecast_error", "date": "2026-11-22", "git": "abc1234", "hardware": "x", "runs": runs}
    (repository / "benchmarks" / "results" / "forecast-error.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    assert script("render.py", "--root", repository).returncode == 0
    on_cpu, on_gpu = json.loads(rates.read_text())
    assert (on_cpu["machine"], on_cpu["shares"], "tflops" in on_cpu) == ("Some CPU, 2 cores", [0.6, 0.6], False)
    assert (on_gpu["machine"], on_gpu["method"], on_gpu["packed"]) == ("NVIDIA H200", "full", True)
    speeds = document["arms"][0]["tokens_per_s"]["values"]
    assert on_gpu["tflops"] == pytest.approx([1e9 * v / 1e12 for v in speeds], rel=0.02)
    page = (repository / "benchmarks" / "README.md").read_text()
    assert "time of the whole command of 2 configurations, largest error **10%**" in page


def test_rows_are_only_added_and_each_once(repository: Path) -> None:
    add(repository, bench())
    first = (repository / "benchmarks" / "results" / "smollm2-135m-gsm8k.jsonl").read_text()
    assert add(repository, bench()).returncode == 2
    assert add(repository, bench(date="2026-11-22", objections=["2 repeats, fewer than 5"])).returncode == 0
    both = (repository / "benchmarks" / "results" / "smollm2-135m-gsm8k.jsonl").read_text()
    assert both.startswith(first) and len(both.splitlines()) == 2
    script("render.py", "--root", repository)
    assert "**Not a claim**: 2 repeats, fewer than 5." in (repository / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shift": 0.1}, "INVALID: their losses differ"),
        ({"git": "not a checkout"}, "no git revision"),
    ],
)
def test_what_proves_nothing_is_refused(repository: Path, changes: dict[str, Any], why: str) -> None:
    done = add(repository, bench(**changes))
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((repository / "benchmarks" / "results").iterdir())


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("data.train=../shared/gsm8k/train.jsonl x=1", "data.train=train.jsonl x=1"),
        ("model.name=/models/llama/", "model.name=llama"),
        ("~/x/y.json, ~me/z", "y.json, z"),
        (
            "configs/a.yaml and https://host/a/b.json at 3 TFLOP/s",
            "configs/a.yaml and https://host/a/b.json at 3 TFLOP/s",
        ),
    ],
)
def test_no_folder_of_a_machine_is_kept(monkeypatch: pytest.MonkeyPatch, text: str, cut: str) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import add_result

    assert add_result.portable({"k": [text]}) == {"k": [cut]}


def test_the_battery_names_a_revision_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import add_result
    import battery

    for path in subprocess.check_output(["git", "ls-files", "fasttune"], cwd=ROOT, text=True).splitlines():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(subprocess.check_output(["git", "show", f"HEAD:{path}"], cwd=ROOT))
    assert battery.source_digest(tmp_path) == add_result.digest_of("HEAD")
    with (tmp_path / "fasttune" / "cli.py").open("a") as file:
        file.write("#")
    assert battery.source_digest(tmp_path) != add_result.digest_of("HEAD")


def dry_run(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    command = ["bash", str(FOLDER / "gpu_battery.sh"), "--dry-run", "--out", str(out), *arguments]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": str(out)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=out.parent)
    results = out / "results.jsonl"
    rows = results.read_text().splitlines() if results.exists() else []
    return done, {row["stage"]: row for row in map(json.loads, rows)}


def test_the_battery_keeps_what_is_done_and_says_what_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done, rows = dry_run(out, "--stages", "verify,ceilings,fp8-1024", "--minutes", "5")
    assert done.returncode == 1 and rows["verify"]["status"] == "not run", done.stderr
    assert rows["ceilings"]["status"] == "ok" and rows["ceilings"]["result"]["copy_gb_per_s"] > 0
    assert rows["fp8-1024"]["status"] == "skipped" and "load_in_fp8" in rows["fp8-1024"]["reason"]
    before = (out / "results.jsonl").read_text()
    done, _ = dry_run(out, "--stages", "ceilings,fp8-1024")
    assert done.returncode == 0 and (out / "results.jsonl").read_text() == before
    refused = script("add_result.py", out / "results.jsonl", "--stage", "ceilings")
    assert refused.returncode == 2 and "is a dry run" in refused.stderr
    assert dry_run(out, "--stages", "nonsense")[0].returncode == 2
    assert dry_run(out, "--wheels", str(tmp_path))[0].returncode == 2  # none is there


@pytest.mark.nightly
def test_a_stage_that_fails_is_recorded_and_one_that_lasts_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import battery
    from stages import Stage

    stages = [
        Stage("bad", 1, "{python} -c 'import sys; sys.exit(\"it broke\")'"),
        Stage("long", 0.01, "{python} -c 'import time; time.sleep(60)'"),
        Stage("good", 1, "{python} -c 'print(7)'"),
    ]
    run = battery.Battery(battery.parse([]), tmp_path, tmp_path, [str(ROOT)])
    run.run(stages)
    rows = {row["stage"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == {"bad": "failed", "long": "unfinished", "good": "ok"}
    assert rows["bad"]["reason"] == "it broke" and rows["long"]["seconds"] < 30 and rows["good"]["result"] == 7
    assert run.summary() == 1 and "2 of" not in capsys.readouterr().err


@pytest.mark.nightly
def test_a_benchmark_takes_the_minutes_that_are_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import battery
    from stages import Stage

    monkeypatch.setattr(battery, "LEAST_MINUTES", 0.001)
    sleep = "{python} -c 'import time; time.sleep(60)'"
    run = battery.Battery(battery.parse(["--minutes", "0.05"]), tmp_path, tmp_path, [str(ROOT)])
    run.run([Stage("whole", 1, sleep), Stage("goes-on", 1, sleep + " fasttune.cli bench")])
    assert run.outcomes["whole"]["status"] == "not run"
    assert run.outcomes["goes-on"]["status"] == "unfinished" and run.outcomes["goes-on"]["seconds"] < 30


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_measuring_stage_is_a_job_that_bench_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dry_run: bool
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from stages import STAGES

    from fasttune import cli, config
    from fasttune.bench import run

    for name in ("full-4096", "full-1024", "gsm8k", "alpaca", "shared-prompt"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    places = {"python": "python", "out": "out", "rows": tmp_path, "model": "builtin:tiny"}
    stages = [stage for stage in STAGES if " bench " in stage.command and not (dry_run and "skip: " in stage.small)]
    assert len(stages) >= 10
    for stage in stages:
        text = stage.command.format(**places, stage=stage.name) + (f" {stage.small}" if dry_run else "")
        _, arguments = text.split("fasttune.cli ")
        options, rest = cli.parser().parse_known_args(arguments.split())
        settings = config.load(ROOT / options.config, [*options.overrides, *rest])
        assert run.checked_arms(settings, options.arms, options.repeats, options.steps), stage.name
        fits = 512 if "train_on=assistant" in text else 64  # an answer that is cut off teaches nothing
        fits = 2048 if "shared-prompt" in text else fits
        assert not dry_run or settings.model.max_length == fits, stage.name


def test_the_canary_has_packs_and_rectangles_in_every_step(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU gets them: its two kinds of attention kernels."""
    from fasttune import config
    from fasttune.data import load

    monkeypatch.syspath_prepend(str(FOLDER))
    import stages

    given = [word for word in stages.CANARY.format(python="", stage="canary", out=tmp_path).split() if "=" in word]
    settings = load.with_format(config.load(FOLDER / "battery.yaml", given))
    assert settings.train.gradient_checkpointing == "unsloth" and settings.model.dtype == "auto"
    batches = load.encode(settings, tiny_tokenizer, True, lambda *_: None)
    for step in range(settings.train.max_steps or 0):
        made = batches.micro_batches(step)
        assert {"packed_seq_lengths" in batch for batch in made} == {True, False}
        assert any(len(batch["input_ids"]) == 2 for batch in made)


def test_recipes_are_tried_until_the_best_rate_is_between_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each arm at its own best rate, and a seed of all before the next; the table compares within a seed."""
    monkeypatch.syspath_prepend("benchmarks")
    import recipes

    monkeypatch.setattr(recipes, "ARMS", {"default": [], "other": []})
    monkeypatch.setattr(recipes, "SEEDS", (1, 2, 3))
    done: list[dict[str, Any]] = []
    while run := next(recipes.wanted(done), None):
        task, arm, rate, seed = run
        best = {"default": 5e-4, "other": 3e-3}[arm]
        loss = 1 + abs(rate - best) + seed / 10 - (0.5 + seed / 100) * (arm == "other")
        done.append({"task": task, "arm": arm, "learning_rate": rate, "seed": seed, "loss": loss})
    order = [(row["task"], row["arm"], row["learning_rate"], row["seed"]) for row in done]
    tried = {
        arm: {rate for _, a, rate, seed in order if (a, seed) == (arm, recipes.SEARCH_SEED)} for arm in recipes.ARMS
    }
    first = {5e-4, 1.25e-3, 3e-3}  # and the neighbour of the best, which is at an end of them
    assert tried == {"default": {2e-4} | first, "other": first | {7.5e-3}}
    counted = [each for each in order if each[3] != recipes.SEARCH_SEED]
    assert counted[:4] == [
        (task, arm, rate, 1) for task in recipes.TASKS for arm, rate in (("default", 5e-4), ("other", 3e-3))
    ]
    assert len(order) == len(set(order)) == 2 * 2 * (4 + 3)
    speeds = [
        {"arm": arm, "tokens_per_s": 100 + at - 30 * (arm == "other"), "peak_memory_gib": 2, "seconds_to_first_step": 9}
        | {"machine": "a card"}
        for at in (0, 5, 1)
        for arm in ("default", "other")
    ]
    table = recipes.table(done, speeds)
    assert "| other | 71 (70 to 75) | 0.703 | 2.00 | 9 |" in table
    # The differences are -0.51, -0.52 and -0.53: their mean over their standard error is -0.52 / (0.01 / √3).
    assert "| other | 0.003 | 3 | 0.6800 ± 0.0900 | -0.5200 | -90.1 |" in table
