#!/usr/bin/env python3
"""fasttune against plain Hugging Face on a CPU: the same rows a step, the same initial adapter, losses compared.

    python benchmarks/cpu_step.py CONFIG [key=value …] [--steps 8] [--repeats 5] [--out FILE.jsonl]

Arms, interleaved, each repeat in a fresh process:
  fasttune   `fasttune train CONFIG`
  vanilla    transformers.Trainer + PEFT, padded rows, default attention and optimizer

Tokens are those of the rows, padding never counted, the same number for both arms. Prints a table, appends one line to
--out, and fails (exit 1) when the losses of a step differ by more than TOLERANCE.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TOLERANCE = 2e-3  # relative, on a step's loss: fp32 sums in another order, amplified by a few optimizer steps
ARMS = ["vanilla", "fasttune"]


def main() -> int:
    options = parser().parse_args()
    if options.arm == "vanilla":
        return vanilla(options, Path(options.scratch))
    if options.arm == "initial":
        return initial(options, Path(options.scratch))
    with tempfile.TemporaryDirectory() as scratch:
        run(options, "initial", scratch)
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for repeat in range(options.repeats):
            for arm in ARMS:
                results[arm].append(run(options, arm, scratch))
                print(f"repeat {repeat + 1} {arm}: {results[arm][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    row = compare(options, results)
    print(report(row))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0 if row["parity"]["valid"] else 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("config")
    top.add_argument("overrides", nargs="*", metavar="key=value")
    top.add_argument("--steps", type=int, default=8)
    top.add_argument("--repeats", type=int, default=5)
    top.add_argument("--out", help="JSON lines file to append the result to")
    top.add_argument("--arm", choices=["vanilla", "initial"], help=argparse.SUPPRESS)
    top.add_argument("--scratch", help=argparse.SUPPRESS)
    return top


def settings(options: argparse.Namespace) -> Any:
    from fasttune import config

    return config.load(options.config, [*options.overrides, f"train.max_steps={options.steps}", "samples=0"])


def run(options: argparse.Namespace, arm: str, scratch: str) -> dict[str, Any]:
    """One arm in a fresh process; its measured steps."""
    if arm != "fasttune":
        command = [sys.executable, __file__, options.config, *options.overrides, "--arm", arm, "--scratch", scratch]
        done = subprocess.run([*command, "--steps", str(options.steps)], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        limits = [f"train.max_steps={options.steps}", "samples=0", f"output_dir={folder}/run"]
        command = [sys.executable, "-m", "fasttune.cli", "train", options.config, *options.overrides, *limits, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        steps = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    keys = ("tokens_per_s", "peak_memory_gib", "fraction_of_measured_matmul", "measured_matmul_tflops", "backend")
    return {key: result[key] for key in keys} | {key: [s[key] for s in steps] for key in ("loss", "seconds", "tokens")}


def initial(options: argparse.Namespace, scratch: Path) -> int:
    """Write what both arms share: the adapter that `fasttune train` starts from, and the rows of every step."""
    from fasttune import prepare, terminal

    config = settings(options)
    job = prepare.prepare(config, scratch / "unused", terminal.Reporter(None, quiet=True))
    import torch

    torch.save({n: p.detach() for n, p in job.model.named_parameters() if p.requires_grad}, scratch / "initial.pt")
    rows = [[job.data.parts[p].row(r) for p, r in job.data.rows_of(step)] for step in range(job.total_steps)]
    steps = [[(ids.tolist(), learned.tolist()) for ids, learned in step] for step in rows]
    (scratch / "rows.json").write_text(json.dumps(steps))
    (scratch / "config.json").write_text(job.config.model_dump_json())
    print(json.dumps({}))
    return 0


def vanilla(options: argparse.Namespace, scratch: Path) -> int:
    """What a reader of the Hugging Face documentation writes."""
    import time

    import peft
    import torch
    import transformers

    from fasttune import builtin
    from fasttune.config import Config
    from fasttune.metrics import WARMUP_STEPS

    config = Config.model_validate_json((scratch / "config.json").read_text())
    steps = json.loads((scratch / "rows.json").read_text())
    model_dir = builtin.path(config.model.name) if config.model.name.startswith("builtin:") else config.model.name
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    lora = config.lora
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM"),
    )
    start = torch.load(scratch / "initial.pt", weights_only=True)
    missing, unexpected = model.load_state_dict(start, strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not unexpected and not trained & set(missing), "both arms must start from the same adapter"
    rows = [
        {"input_ids": ids, "labels": [i if keep else -100 for i, keep in zip(ids, learned, strict=True)]}
        for step in steps
        for ids, learned in step
    ]

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            self.losses += [logs["loss"]] if logs and "loss" in logs else []

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    clock = Clock()
    total = len(steps)
    train = config.train
    arguments = transformers.TrainingArguments(
        output_dir=str(scratch / "vanilla"),
        per_device_train_batch_size=train.batch_rows,
        num_train_epochs=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=round(train.warmup_ratio * total),
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=config.seed,
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    tokens = [sum(len(ids) for ids, _ in step) for step in steps]
    warm = WARMUP_STEPS if total > 2 * WARMUP_STEPS else 1
    speeds = [n / s for n, s in zip(tokens, clock.seconds, strict=True)]
    import resource

    peak_memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"tokens_per_s": statistics.median(speeds[warm:]), "peak_memory_gib": peak_memory_gib}
    print(json.dumps(result | {"loss": clock.losses, "seconds": clock.seconds, "tokens": tokens}))
    return 0


def compare(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The line of results/*.jsonl: every repeat's values, the ratio of medians, the parity of the losses."""
    from fasttune import hardware, summary

    fasttune, plain = results["fasttune"], results["vanilla"]
    assert all(f["tokens"] == v["tokens"] for f, v in zip(fasttune, plain, strict=True)), "the arms saw other rows"
    speed = {arm: [r["tokens_per_s"] for r in results[arm]] for arm in ARMS}
    difference = max(
        abs(a - b) / abs(b) for f in fasttune for v in plain for a, b in zip(f["loss"], v["loss"], strict=True)
    )
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "benchmark": "cpu_step",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/cpu_step.py {Path(options.config)} " + " ".join(_portable(options.overrides)),
        "git": git.stdout.strip(),
        "hardware": summary.hardware_line(hardware.detect(Path.cwd())),
        "versions": summary.versions(),
        "steps": options.steps,
        "tokens_per_s": speed,
        "peak_memory_gib": {arm: [r["peak_memory_gib"] for r in results[arm]] for arm in ARMS},
        "ratio_of_medians": statistics.median(speed["fasttune"]) / statistics.median(speed["vanilla"]),
        "ratios_of_pairs": [f / v for f, v in zip(speed["fasttune"], speed["vanilla"], strict=True)],
        "fraction_of_measured_matmul": [r["fraction_of_measured_matmul"] for r in fasttune],
        "measured_matmul_tflops": [r["measured_matmul_tflops"] for r in fasttune],
        "losses": {arm: results[arm][0]["loss"] for arm in ARMS},
        "parity": {"largest_relative_difference": difference, "tolerance": TOLERANCE, "valid": difference <= TOLERANCE},
        "backend": fasttune[0]["backend"],
        "claim": options.repeats >= 5,
    }


def _portable(overrides: list[str]) -> list[str]:
    """key=value without the folders of this machine."""
    return [f"{key}={os.path.basename(value) if '/' in value else value}" for key, _, value in map(_parts, overrides)]


def _parts(override: str) -> tuple[str, str, str]:
    return override.partition("=")


def report(row: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [row["command"], row["hardware"]]
    for arm in ARMS:
        values = row["tokens_per_s"][arm]
        memory = statistics.median(row["peak_memory_gib"][arm])
        lines.append(
            f"{arm:10} {statistics.median(values):7.1f} tokens/s  ({min(values):.1f} to {max(values):.1f}, "
            f"{len(values)} repeats)  peak {memory:.1f} GiB"
        )
    share = [value for value in row["fraction_of_measured_matmul"] if value is not None]
    lines.append(f"fasttune / vanilla {row['ratio_of_medians']:.2f}")
    lines.append(f"share of the measured matmul rate {statistics.median(share):.0%}" if share else "no matmul rate")
    verdict = "agree" if row["parity"]["valid"] else "DIFFER: INVALID"
    lines.append(f"losses {verdict} (largest relative difference {row['parity']['largest_relative_difference']:.1e})")
    return "\n".join(lines) + ("" if row["claim"] else "\nfewer than five repeats: not a claim")


if __name__ == "__main__":
    sys.exit(main())
