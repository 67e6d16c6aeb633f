#!/usr/bin/env python3
"""Which LoRA recipe learns more from the same tokens:  python benchmarks/recipes.py GSM8K_TRAIN GSM8K_TEST [--hours H]

SmolLM2-135M for STEPS steps on GSM8K and on the built-in problems. Each arm has the best of at least three learning
rates, found in runs of half as many steps on a seed that does not count; while the best is at an end of those tried,
its neighbour is tried too. Then SEEDS seeds, one arm after the other. All in bf16 under autocast with float32
adapters, as on a GPU: on a CPU with avx512_bf16, 2.4 times as fast as float32. A line is appended to
results/recipes/runs.jsonl as each run ends; the same command continues where it stopped, and --hours ends it in time.
Losses do not depend on what else the machine does, so one run a core goes on at a time, at low priority.

Speed does depend on it: `--speed`, on a machine that does nothing else, measures each arm by itself, SPEED_REPEATS
times, interleaved, in results/recipes/speed.jsonl. Then benchmarks/render.py writes the tables of docs/recipes.md.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import os
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
SPEED = RESULTS.with_name("speed.jsonl")
STEPS, HELD_OUT_ROWS, SEEDS, SEARCH_SEED = 120, 128, (1, 2, 3, 4, 5), 99
SPEED_STEPS, SPEED_REPEATS = 12, 3
BATCH_ROWS, MAX_LENGTH = 2, 160  # of GSM8K the shorter problems, as 128 runs must fit into 12 hours of one core
RATES = (3.2e-5, 8e-5, 2e-4, 5e-4, 1.25e-3, 3e-3, 7.5e-3)
FIRST_RATES = RATES[3:6]  # then its neighbour, as long as the best is the lowest or the highest that was tried
ARMS: dict[str, list[str]] = {
    "default": [],
    "rsLoRA": ["lora.rslora=true"],
    "PiSSA": ["lora.init=pissa"],
    "PiSSA + rsLoRA": ["lora.init=pissa", "lora.rslora=true"],
    "PiSSA + rsLoRA, refactored every 40": ["lora.init=pissa", "lora.rslora=true", "lora.refactor_every=40"],
    "PiSSA + rsLoRA, refactored every 10": ["lora.init=pissa", "lora.rslora=true", "lora.refactor_every=10"],
    "LoRA+": ["lora.plus_ratio=16"],  # the paper's choice: https://arxiv.org/abs/2402.12354
    "Riemannian": [],
}
BASELINE = "default"
TASKS = ("gsm8k", "arithmetic")


Run = tuple[str, str, float, int]  # task, arm, learning rate, seed


def wanted(done: list[dict[str, Any]]) -> Iterator[Run]:
    """The missing runs: rates first, then a seed of every arm at a time."""
    have = {(row["task"], row["arm"], row["learning_rate"], row["seed"]) for row in done}
    for task in TASKS:
        for arm in ARMS:
            yield from ((task, arm, rate, SEARCH_SEED) for rate in search(done, task, arm)[1])
    for seed in SEEDS:
        for task in TASKS:
            for arm in ARMS:
                best, missing = search(done, task, arm)
                if not missing and (task, arm, best, seed) not in have:
                    yield task, arm, best, seed


def search(done: list[dict[str, Any]], task: str, arm: str) -> tuple[float, list[float]]:
    """(best rate so far, rates to try before it counts): the first three, then neighbours of the best."""
    rows = [row for row in done if (row["task"], row["arm"], row["seed"]) == (task, arm, SEARCH_SEED)]
    tried = {row["learning_rate"]: math.inf if row["loss"] is None else row["loss"] for row in rows}  # None: diverged
    best = min(tried, key=lambda rate: tried[rate], default=FIRST_RATES[1])
    at = RATES.index(best)
    near = FIRST_RATES if len(tried) < len(FIRST_RATES) else RATES[max(0, at - 1) : at + 2]
    return best, [rate for rate in near if rate not in tried]


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
        f"train.batch_rows={BATCH_ROWS}",
        f"model.max_length={MAX_LENGTH}",
        "model.dtype=bfloat16",
        "data.too_long=drop",
        "checkpoint.every=never",
    ]


def result(arm: str, asked: list[str], threads: int | None = None, script: str | Path = __file__) -> dict[str, Any]:
    """run.json of one run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--one", arm, "--", *asked, f"output_dir={folder}/run"]
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        path = Path(folder, "run", "run.json")
        if not path.exists():
            raise RuntimeError(f"{arm}: {ended.stderr[-2000:]}")
        told: dict[str, Any] = json.loads(path.read_text())
        return told


def measure(run: Run, files: list[str], steps: int, model: str) -> dict[str, Any]:
    """One run on one core; its line."""
    task, arm, rate, seed = run
    steps = steps // 2 if seed == SEARCH_SEED else steps
    told = result(arm, [*settings(task, arm, rate, seed, files, steps), f"model.name={model}"], threads=1)
    after = (told["held_out"] or {}).get("after") or {}
    return {
        "task": task,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "steps": told["steps"],
        "status": told["status"],
        "loss": after.get("loss"),
        "token_accuracy": after.get("token_accuracy"),
        "tokens": told["tokens"],
        "wall_s": round(told["wall_s"], 1),
    } | where()


def speed(arm: str, files: list[str], model: str) -> dict[str, Any]:
    """A short run on all cores, for its seconds and memory; its line."""
    asked = settings("gsm8k", arm, FIRST_RATES[0], SEARCH_SEED, files, SPEED_STEPS)
    told = result(arm, [*asked, f"model.name={model}", "data.eval=null"])
    names = ("steps", "tokens_per_s", "peak_memory_gib", "seconds_to_first_step")
    return {"arm": arm} | {name: told[name] for name in names} | where()


def where() -> dict[str, Any]:
    return {
        "machine": hardware.machine_name(hardware.detect()),
        "git": revision(),
        "date": f"{datetime.date.today()}",
    }


def one(arm: str, overrides: list[str]) -> None:
    """In a process of its own: `fasttune train`, for one arm with an optimizer that it does not offer."""
    from fasttune import config, terminal
    from fasttune.core import evaluation, train, trainer

    os.nice(0 if "data.eval=null" in overrides else 10)
    ends = evaluation.Validator._at_an_end  # the held-out loss before the first step is the same in every arm
    evaluation.Validator._at_an_end = lambda self, step: step > 0 and ends(self, step)  # type: ignore[method-assign]
    build = trainer.build

    def preconditioned(*arguments: Any, **options: Any) -> Any:
        import torch
        from peft.optimizers import create_riemannian_optimizer

        made = build(*arguments, **options)
        rate = made.args.learning_rate
        made.optimizer = create_riemannian_optimizer(made.model, torch.optim.AdamW, lr=rate, weight_decay=0.0)
        return made

    if arm == "Riemannian":
        trainer.build = preconditioned
    reporter = terminal.Reporter(console=terminal.Console(quiet=True))
    train.run(config.load(str(ROOT / "configs" / "smollm2_135m_gsm8k.yaml"), overrides), reporter)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def page(root: Path) -> str:
    return table(read(root / RESULTS), read(root / SPEED))


def table(rows: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> str:
    """Markdown: held-out loss of each arm, its spread over the seeds, the paired difference from the baseline, and what
    a step of GSM8K costs."""
    if not any(row["seed"] in SEEDS for row in rows):
        at_least = len(TASKS) * len(ARMS) * (len(FIRST_RATES) + len(SEEDS))
        return f"Nothing can be compared yet: {len(rows)} of at least {at_least} runs."
    made = []
    for task in TASKS:
        counted = [row for row in rows if row["task"] == task and row["seed"] in SEEDS and row["loss"] is not None]
        rates = {arm: search(rows, task, arm)[0] for arm in ARMS}
        by_arm = {
            arm: {row["seed"]: row for row in counted if (row["arm"], row["learning_rate"]) == (arm, rates[arm])}
            for arm in ARMS
        }
        made += [f"**{task}**", "", "| recipe | learning rate | seeds | held-out loss | against default | t |"]
        made.append("| --- | --- | --- | --- | --- | --- |")
        for arm, seeds in by_arm.items():
            if not seeds:
                continue
            losses = [row["loss"] for row in seeds.values()]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            difference, t = paired(seeds, by_arm[BASELINE]) if arm != BASELINE else ("", "")
            loss = f"{statistics.mean(losses):.4f}{spread}"
            made.append(f"| {arm} | {rates[arm]:g} | {len(losses)} | {loss} | {difference} | {t} |")
        made.append("")
    return "\n".join(made + cost(speeds))


def cost(speeds: list[dict[str, Any]]) -> list[str]:
    """Rows of a table: medians of an arm's repeats, and how far apart the speeds were."""
    if not speeds:
        return ["Speed has not been measured yet."]
    made = ["| recipe | tokens/s | of default's | peak memory, GiB | seconds to the first step |"]
    made.append("| --- | --- | --- | --- | --- |")
    by_arm = {arm: [row for row in speeds if row["arm"] == arm] for arm in ARMS}
    base = statistics.median(row["tokens_per_s"] for row in by_arm[BASELINE])
    for arm, repeats in by_arm.items():
        if not repeats:
            continue
        fast = [row["tokens_per_s"] for row in repeats]
        memory, first = (
            statistics.median(row[name] for row in repeats) for name in ("peak_memory_gib", "seconds_to_first_step")
        )
        made.append(
            f"| {arm} | {statistics.median(fast):.0f} ({min(fast):.0f} to {max(fast):.0f}) "
            f"| {statistics.median(fast) / base:.3f} | {memory:.2f} | {first:.0f} |"
        )
    machines = ", ".join(sorted({row["machine"] for row in speeds}))
    return [*made, "", f"{SPEED_STEPS} steps, {len(by_arm[BASELINE])} times each, interleaved: {machines}."]


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
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer to try it out: name another --out")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / RESULTS)
    parser.add_argument("--speed", action="store_true", help="seconds and memory in place of losses")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.files)
        return
    if len(options.files) != 2:
        parser.error("name GSM8K's train and test file")
    if options.out == ROOT / RESULTS and (options.steps != STEPS or options.model != "builtin:smollm2-135m"):
        parser.error("another length or model: name another --out")
    options.out.parent.mkdir(exist_ok=True)
    if options.speed:
        for arm in [*ARMS] * SPEED_REPEATS:
            append(options.out.with_name(SPEED.name), speed(arm, options.files, options.model))
        return
    losses(options)


def losses(options: argparse.Namespace) -> None:
    """All runs that are missing, one on each core at a time."""
    done, ends = read(options.out), time.monotonic() + 3600 * options.hours
    going: dict[concurrent.futures.Future[dict[str, Any]], Run] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while True:
            free = (os.cpu_count() or 1) - len(going)
            begun = [run for run in wanted(done) if run not in going.values()][: max(0, free)]
            for run in begun if time.monotonic() < ends else []:
                print(*run, sep=" · ", flush=True)
                going[pool.submit(measure, run, options.files, options.steps, options.model)] = run
            if not going:
                return
            ended, _ = concurrent.futures.wait(going, return_when=concurrent.futures.FIRST_COMPLETED)
            for each in ended:
                del going[each]
                done.append(append(options.out, each.result()))


def append(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
