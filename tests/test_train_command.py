"""`fasttune train`, the real command, once: what it writes, and that its numbers are those of what ran.

On rows and under a name that would be markup, with secrets in its environment, and no network that it may ask.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import guarded
import pytest
import test_budgets
import yaml

from fasttune import config

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 512},
    "data": {"train": "<script>rows.jsonl", "eval": "held_out.jsonl"},
    "lora": {"rank": 4, "alpha": 8},
    "train": {"batch_rows": 8, "max_steps": 4, "learning_rate": 1e-2},
    "checkpoint": {"every": "1 steps"},
    "samples": 1,
    "eval": {"problems": 3},
}


def write(path: Path, name: str, count: int) -> None:
    rows = [{"question": f"<script>{name}({i})</script>", "answer": f"<img src=x>\n#### {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run; beside it what it was given, what it printed, and what it asked for."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TREE))
    write(folder / "<script>rows.jsonl", "trained", 32)
    write(folder / "held_out.jsonl", "held out", 8)
    before = {path.name for path in folder.iterdir()}
    environment, attempts = guarded.environment(tmp_path_factory.mktemp("guard"))
    online = os.environ | guarded.SECRETS | environment | {"HF_HUB_OFFLINE": ""}
    asked = ["train", "tiny.yaml", "output_dir=run", "usd_per_hour=3.6", "--json"]
    command = [sys.executable, "-X", "importtime", "-m", "fasttune.cli", *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=online, umask=0o027)
    assert done.returncode == 0, done.stderr
    assert {entry.name for entry in folder.iterdir()} == before | {"run"}, "nothing strays into the current folder"
    (folder / "stdout").write_text(done.stdout)
    imports, said = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    (folder / "imports").write_text("\n".join(line.rpartition("|")[2].strip() for line in imports))
    (folder / "stderr").write_text("\n".join(said))
    (folder / "attempts").write_text(attempts.read_text() if attempts.exists() else "")
    return folder / "run"


@pytest.fixture
def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


@pytest.fixture
def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_writes_the_contract(run: Path, result: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    written = {path.name for path in run.iterdir()}
    assert written == {"config.yaml", "metrics.jsonl", "run.json", "report.html", "adapter", "library.log", ".lock"} | {
        "checkpoints"
    }
    goldens.contract("run.json", result)
    goldens.contract("metrics.jsonl", steps)
    assert result["status"] == "completed" and result["steps"] == 4
    assert json.loads((run.parent / "stdout").read_text().splitlines()[-1]) == result
    adapter = {path.name for path in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= adapter
    assert len(result["samples"]) == 1 and result["samples"][0]["reference"].count("####") == 1
    assert result["exact_match"] == {"problems": 3, "before": 0.0, "after": 0.0}  # what a random model can do


def test_it_loads_only_what_it_needs(run: Path) -> None:
    """Of this package: what is for rare cases (a hub, a GPU, --resume, an error) stays unread."""
    loaded = {name for name in (run.parent / "imports").read_text().split() if name.partition(".")[0] == "fasttune"}
    loaded -= {"fasttune.core.builtin_models"}  # makes the model, once a machine
    assert {"fasttune", "fasttune.core.train", "fasttune.tools.card"} <= loaded
    files = [Path(*name.split(".")) for name in loaded | {"fasttune.cli"}]
    files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files]
    assert len(files) <= test_budgets.RUN_MODULES, sorted(loaded)
    test_budgets.check("a run", files, test_budgets.RUN_LINES, test_budgets.RUN_CODE_LINES)


def test_its_files_are_as_readable_as_the_umask_says(run: Path) -> None:
    """Those of the checkpoints and of the adapter too: libraries make them readable by one user only."""
    modes = {path: path.stat().st_mode & 0o777 for path in run.rglob("*")}
    assert {path.name: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def test_the_numbers_are_those_of_the_steps(result: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert (result["first_loss"], result["last_loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    for name in ("tokens", "loss_tokens"):
        assert result[name] == sum(step[name] for step in steps)
    for step in steps:
        assert 0 < step["loss_tokens"] < step["tokens"] and step["padding_tokens"] >= 0
        assert step["tokens_per_s"] == pytest.approx(step["tokens"] / step["seconds"])
    assert result["cost_usd"] == pytest.approx(3.6 * result["wall_s"] / 3600)
    assert result["usd_per_million_tokens"] == pytest.approx(1000 / result["tokens_per_s"])
    assert 0 < result["fraction_of_measured_matmul"] < 1.5
    assert result["mfu"] is None  # no datasheet peak for a CPU


def test_the_backend_is_what_ran(result: dict[str, Any]) -> None:
    backend = result["backend"]
    assert backend["attention"] == "RowsAttention" and backend["gradient_checkpointing"] == "none"
    assert backend["packing"].startswith("packed: 8 rows in 1 micro-batch, ")


def test_the_forecast_is_near_to_what_was_measured(run: Path, result: dict[str, Any]) -> None:
    """Most of such a small run is Python and its libraries. Larger ones are in benchmarks/results."""
    forecast, told = result["forecast"], (run.parent / "stderr").read_text()
    assert forecast["peak_memory_gib"]["expected"] == pytest.approx(result["peak_memory_gib"], rel=0.15)
    assert (forecast["steps"], forecast["tokens"]) == (result["steps"], result["tokens"])
    assert forecast["tokens_per_s"] is None and "small" in forecast["rate"]
    assert "forecast" in {each["name"] for each in result["settings"]}
    assert "forecast" in told and "measured" in told and "forecast" in (run / "report.html").read_text()


def test_the_panel_comes_first_and_each_wait_has_its_line(run: Path) -> None:
    told = (run.parent / "stderr").read_text()
    waits = ("importing unsloth", "loading ", "╭─", "held-out problems …", "held-out loss …", "training: ", "step 1/")
    places = [told.index(each) for each in waits]
    assert places == sorted(places)
    assert told.count("held-out problems …") == 2  # before and after


def test_it_asks_for_nothing_by_itself_and_writes_no_token(run: Path) -> None:
    assert (run.parent / "attempts").read_text() == ""
    files = guarded.written(run.parent)
    assert "run/library.log" in files and any("checkpoints" in file for file in files)
    assert not guarded.leaks(files)


def test_what_a_row_or_the_name_of_a_file_says_is_text(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;rows.jsonl" in page and "&lt;script&gt;held out(" in page and "&lt;img src=x&gt;" in page


def test_its_resolved_config_reproduces_the_run(
    unsloth: None, run: Path, steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune import terminal
    from fasttune.core import train

    monkeypatch.chdir(run.parent)
    assert "auto" not in (run / "config.yaml").read_text().replace("format: auto", "")
    train.run(config.load(run / "config.yaml", [f"output_dir={tmp_path / 'again'}"]), terminal.Reporter(quiet=True))
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in again] == [step["loss"] for step in steps]
