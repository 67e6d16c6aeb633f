#!/usr/bin/env python3
"""What rounding costs a LoRA run:  python benchmarks/precision.py GSM8K_TRAIN GSM8K_TEST [--hours H]

The `default` recipe of recipes.py on GSM8K, at the rate it was given there, on its first seeds, in other arithmetic:

float32       all of it
one rounding  bf16, but W x and B A x are added before the sum is rounded. As PEFT and Unsloth add them, W x is rounded
              first, and a B A x of less than half its last bit is lost: at the start, when B is near 0, most of it
FP8           bf16, with the frozen matmuls in e4m3 both ways (fp8.py), held-out rows without it

A line is appended to results/recipes/precision.jsonl as each run ends; the same command continues.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import recipes

ROWS = recipes.RESULTS.with_name("precision.jsonl")
ARMS: dict[str, list[str]] = {"float32": ["model.dtype=float32"], "one rounding": [], "FP8": []}
SEEDS = recipes.SEEDS[:3]


def one(arm: str, overrides: list[str]) -> None:
    """In a process of its own."""
    from fasttune.core import trainer

    build = trainer.build

    def changed(*arguments: Any, **options: Any) -> Any:
        made = build(*arguments, **options)
        if arm == "FP8":
            from fp8 import Fp8Matmuls

            mode, plain_step = Fp8Matmuls(made.model, least=1), made.training_step

            def step(*args: Any, **kwargs: Any) -> Any:
                with mode:
                    return plain_step(*args, **kwargs)

            made.training_step = step
        if arm == "one rounding":
            round_once()
        return made

    trainer.build = changed
    recipes.one(recipes.BASELINE, overrides)


def round_once() -> None:
    """PEFT's LoRA layer, its output's value from one rounding; gradients as they are in bf16."""
    import torch
    from peft.tuners.lora.layer import Linear

    plain_forward = Linear.forward

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = plain_forward(self, x, *args, **kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            a, b = (side["default"].weight.bfloat16().float() for side in (self.lora_A, self.lora_B))
            wide = x.bfloat16().float()
            inner = (wide @ a.t()).bfloat16().float()
            exact = wide @ self.base_layer.weight.float().t() + (inner @ b.t()) * self.scaling["default"]
            rounded = exact.to(plain.dtype)
        return plain + (rounded - plain).detach()

    Linear.forward = forward  # type: ignore[method-assign]


def page(root: Path) -> str:
    """For docs/recipes.md, behind the recipes' own tables."""
    rows = recipes.read(root / ROWS)
    return "\n\n**other arithmetic, gsm8k**\n\n" + table(rows, recipes.read(root / recipes.RESULTS)) if rows else ""


def table(rows: list[dict[str, Any]], bf16: list[dict[str, Any]]) -> str:
    """Markdown: held-out loss of each arithmetic over the same seeds, and the paired difference from bf16."""
    rate, _ = recipes.search(bf16, "gsm8k", recipes.BASELINE)
    plain = {
        row["seed"]: row
        for row in bf16
        if (row["task"], row["arm"], row["learning_rate"]) == ("gsm8k", recipes.BASELINE, rate)
    }
    by_arm = {"bf16": {seed: plain[seed] for seed in SEEDS if seed in plain}}
    by_arm |= {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in ARMS}
    made = ["| arithmetic | seeds | held-out loss | against bf16 | t |", "| --- | --- | --- | --- | --- |"]
    for arm, seeds in by_arm.items():
        if losses := [row["loss"] for row in seeds.values()]:
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            difference, t = recipes.paired(seeds, by_arm["bf16"]) if arm != "bf16" else ("", "")
            made.append(f"| {arm} | {len(losses)} | {statistics.mean(losses):.4f}{spread} | {difference} | {t} |")
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="GSM8K's train and test file")
    parser.add_argument("--hours", type=float, default=12.0, help="no run is begun after so long")
    parser.add_argument("--recipes", type=Path, default=recipes.ROOT / recipes.RESULTS, help="rows of recipes.py")
    parser.add_argument("--out", type=Path, default=recipes.ROOT / ROWS)
    parser.add_argument("--steps", type=int, default=recipes.STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.files)
        return
    rate, missing = recipes.search(recipes.read(options.recipes), "gsm8k", recipes.BASELINE)
    if len(options.files) != 2 or missing:
        parser.error("name GSM8K's train and test file, after recipes.py has found the rate")
    have = {(row["arm"], row["seed"]) for row in recipes.read(options.out)}
    ends = time.monotonic() + 3600 * options.hours

    def measure(run: tuple[str, int]) -> None:
        arm, seed = run
        if run in have or time.monotonic() > ends:
            return
        print(*run, sep=" · ", flush=True)
        asked = recipes.settings("gsm8k", recipes.BASELINE, rate, seed, options.files, options.steps)
        told = recipes.result(
            arm, [*asked, *ARMS[arm], "model.name=builtin:smollm2-135m"], threads=1, script=Path(__file__)
        )
        after = told["held_out"]["after"]
        row = {"task": "gsm8k", "arm": arm, "learning_rate": rate, "seed": seed, "steps": told["steps"]}
        row |= {name: told[name] for name in ("status", "tokens")} | {"loss": after["loss"]}
        recipes.append(options.out, row | {"wall_s": round(told["wall_s"], 1)} | recipes.where())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(measure, [(arm, seed) for seed in SEEDS for arm in ARMS]))
    print(table(recipes.read(options.out), recipes.read(options.recipes)))


if __name__ == "__main__":
    sys.exit(main())
