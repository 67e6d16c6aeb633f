#!/usr/bin/env python3
"""Which LoRA recipe learns more from the same tokens:  python benchmarks/recipes.py GSM8K_TRAIN GSM8K_TEST [--hours H]

SmolLM2-135M for STEPS steps on GSM8K and on the built-in problems. Each arm has the best of three learning rates, found
on a seed that does not count, and then SEEDS seeds, one arm after the other. A line is appended to
results/recipes/runs.jsonl as each run ends; the same command continues where it stopped, and --hours ends it in time.
Losses do not depend on what else the machine does; the seconds of a line do, and are no claim.

Then run benchmarks/render.py, which writes the table of docs/recipes.md.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune import hardware
from fasttune.bench.run import revision

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks", "results", "recipes", "runs.jsonl")  # beside the rows of `fasttune bench`, which differ
STEPS, HELD_OUT_ROWS, SEEDS, SEARCH_SEED = 120, 128, (1, 2, 3, 4, 5), 99
RATES = (2e-4, 5e-4, 1.25e-3)
ARMS: dict[str, list[str]] = {
    "default": [],
    "rsLoRA": ["lora.rslora=true"],
    "PiSSA": ["lora.init=pissa"],
    "PiSSA + rsLoRA": ["lora.init=pissa", "lora.rslora=true"],
    "PiSSA + rsLoRA, refactored every 40": ["lora.init=pissa", "lora.rslora=true", "lora.refactor_every=40"],
    "PiSSA + rsLoRA, refactored every 10": ["lora.init=pissa", "lora.rslora=true", "lora.refactor_every=10"],
    "default, refactored every 10": ["lora.refactor_every=10"],
    "LoRA+": ["lora.plus_ratio=16"],  # the paper's choice: https://arxiv.org/abs/2402.12354
    "Riemannian": [],
}
BASELINE = "default"
TASKS = ("gsm8k", "arithmetic")


def wanted(done: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, int]]:
    """(task, arm, learning rate, seed) of the missing runs: rates first, then a seed of every arm at a time."""
    have = {(row["task"], row["arm"], row["learning_rate"], row["seed"]) for row in done}
    for task in TASKS:
        for arm in ARMS:
            yield from ((task, arm, rate, SEARCH_SEED) for rate in RATES if (task, arm, rate, SEARCH_SEED) not in have)
    for seed in SEEDS:
        for task in TASKS:
            for arm in ARMS:
                rate = best_rate(done, task, arm)
                if rate is not None and (task, arm, rate, seed) not in have:
                    yield task, arm, rate, seed


def best_rate(done: list[dict[str, Any]], task: str, arm: str) -> float | None:
    tried = [row for row in done if (row["task"], row["arm"], row["seed"]) == (task, arm, SEARCH_SEED)]
    tried = [row for row in tried if row["loss"] is not None]
    return min(tried, key=lambda row: row["loss"])["learning_rate"] if len(tried) == len(RATES) else None


def settings(task: str, arm: str, rate: float, seed: int, files: list[str], steps: int) -> list[str]:
    data = {
        "gsm8k": [f"data.train={files[0]}", f"data.eval={files[1]}"],
        "arithmetic": ["data.train=builtin:arithmetic", "data.eval=builtin:arithmetic"],
    }
    return [
        *data[task],
        *ARMS[arm],
        f"train.learning_rate={rate}",
        f"seed={seed}",
        f"train.max_steps={steps}",
        f"eval.rows={HELD_OUT_ROWS}",
        f"train.batch_rows={4 if task == 'gsm8k' else 8}",
        "checkpoint.every=never",
    ]


def measure(task: str, arm: str, rate: float, seed: int, files: list[str], steps: int, model: str) -> dict[str, Any]:
    """One run in a process of its own; its line."""
    with tempfile.TemporaryDirectory() as folder:
        asked = settings(task, arm, rate, seed, files, steps)
        command = [sys.executable, __file__, "--one", arm, "--", *asked, f"model.name={model}"]
        command.append(f"output_dir={folder}/run")
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        path = Path(folder, "run", "run.json")
        if not path.exists():
            sys.exit(f"{arm}: {ended.stderr[-2000:]}")
        told = json.loads(path.read_text())
    held_out = told["held_out"] or {}
    last = held_out.get("last") or {}
    return {
        "task": task,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "steps": told["steps"],
        "status": told["status"],
        "loss": last.get("loss"),
        "token_accuracy": last.get("token_accuracy"),
        "loss_before": (held_out.get("before") or {}).get("loss"),
        "tokens": told["tokens"],
        "tokens_per_s": told["tokens_per_s"],
        "peak_memory_gib": told["peak_memory_gib"],
        "wall_s": told["wall_s"],
        "machine": hardware.machine_name(hardware.detect()),
        "git": revision(),
        "date": f"{datetime.date.today()}",
    }


def one(arm: str, overrides: list[str]) -> None:
    """In a process of its own: `fasttune train`, for one arm with an optimizer that it does not offer."""
    from fasttune import config, terminal
    from fasttune.core import train

    if arm == "Riemannian":
        from fasttune.core import trainer

        build = trainer.build

        def preconditioned(*arguments: Any, **options: Any) -> Any:
            import torch
            from peft.optimizers import create_riemannian_optimizer

            made = build(*arguments, **options)
            rate = made.args.learning_rate
            made.optimizer = create_riemannian_optimizer(made.model, torch.optim.AdamW, lr=rate, weight_decay=0.0)
            return made

        trainer.build = preconditioned
    reporter = terminal.Reporter(console=terminal.Console(quiet=True))
    train.run(config.load(str(ROOT / "configs" / "smollm2_135m_gsm8k.yaml"), overrides), reporter)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: held-out loss of each arm, its spread over the seeds, and the paired difference from the baseline."""
    if not rows:
        return "Nothing has been measured yet."
    made = []
    for task in TASKS:
        counted = [row for row in rows if row["task"] == task and row["seed"] in SEEDS and row["loss"] is not None]
        by_arm = {arm: {row["seed"]: row for row in counted if row["arm"] == arm} for arm in ARMS}
        made += [f"**{task}**", "", "| recipe | learning rate | seeds | held-out loss | against default | t |"]
        made.append("| --- | --- | --- | --- | --- | --- |")
        for arm, seeds in by_arm.items():
            if not seeds:
                continue
            losses = [row["loss"] for row in seeds.values()]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            rates = ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in seeds.values()}))
            difference, t = paired(seeds, by_arm[BASELINE]) if arm != BASELINE else ("", "")
            made.append(
                f"| {arm} | {rates} | {len(losses)} | {statistics.mean(losses):.4f}{spread} | {difference} | {t} |"
            )
        made.append("")
    return "\n".join(made)


def paired(arm: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> tuple[str, str]:
    """(mean difference of the loss over the seeds that both have, Student's t of it: beyond ±2.78 with five seeds the
    difference is not chance, at 5 % two-sided)."""
    differences = [arm[seed]["loss"] - baseline[seed]["loss"] for seed in arm if seed in baseline]
    if len(differences) < 2:
        return "", ""
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    return f"{mean:+.4f}", f"{mean / (deviation / len(differences) ** 0.5):+.1f}" if deviation else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="GSM8K's train and test file")
    parser.add_argument("--hours", type=float, default=12.0, help="no run is begun after so long")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer to try it out: the rows then go to --out only")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.files)
        return
    done = read(options.out)
    if len(options.files) != 2:
        parser.error("name GSM8K's train and test file")
    if options.out == ROOT / RESULTS and (options.steps != STEPS or options.model != "builtin:smollm2-135m"):
        parser.error("another length or model: name another --out")
    ends = time.monotonic() + 3600 * options.hours
    while (run := next(wanted(done), None)) and time.monotonic() < ends:
        print(*run, sep=" · ", flush=True)
        done.append(measure(*run, options.files, options.steps, options.model))
        options.out.parent.mkdir(exist_ok=True)
        with options.out.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")


if __name__ == "__main__":
    main()
