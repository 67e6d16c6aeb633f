#!/usr/bin/env python3
"""Forecast memory and time against measured:  python benchmarks/forecast_error.py ROWS.jsonl --runs DIR [--only s1,m2]

Trains every configuration below on the CPU, alone in its process (what is in DIR already is not run again), and appends
one line to results/forecast-error.jsonl. Memory is forecast with the code as it is now; time is what the run itself
forecast before its first step, so nothing else may run on the machine; the first time on a kind of machine there is no
rate on file, and only the rate is kept. Then run benchmarks/render.py.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import inputs

from fasttune import config as configuration, hardware
from fasttune.bench.run import revision
from fasttune.core import autoconfig, pretrained
from fasttune.core.memory import Shape
from fasttune.data import load, sharing
from fasttune.tools import estimate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "forecast-error.jsonl"
BASE = "data.max_rows=400 train.batch_rows=4 train.max_steps=8 train.learning_rate=1e-4 model.max_length=512".split()
MODELS = {
    "t": "builtin:tiny",
    "s": "builtin:smollm2-135m",
    "q": "builtin:smollm2-135m",
    "m": "six layers",
}  # by the first letter of a name
# name: (the formula's constants were chosen with it, settings)
CONFIGURATIONS: dict[str, tuple[bool, str]] = {
    "t1": (True, "batch_rows=8 max_steps=12"),
    "t2": (True, "method=full packing=false max_length=1024 batch_rows=16 max_steps=4"),
    "m1": (True, "max_steps=20"),
    "m2": (True, "packing=false"),
    "m3": (True, "method=full"),
    "m4": (True, "gradient_checkpointing=full"),
    "m5": (True, "method=full gradient_checkpointing=full packing=false"),
    "m6": (True, "dropout=0.05 rank=32 batch_rows=2"),
    "s1": (True, ""),
    "s2": (True, "packing=false batch_rows=2"),
    "s3": (True, "method=full batch_rows=1"),
    "s4": (True, "gradient_checkpointing=full batch_rows=2"),
    "q1": (True, "data.train=builtin:arithmetic max_steps=16"),
    "q2": (True, "data.train=builtin:arithmetic batch_rows=12"),
    "s6": (True, "batch_rows=8"),
    "s7": (True, "batch_rows=2 rank=16 data.train_on=all"),
    "s8": (True, "batch_rows=6 rank=32"),
    "s9": (True, "batch_rows=12 micro_batch_rows=12"),
    "m7": (True, "batch_rows=8 micro_batch_rows=1 max_length=1024 rank=64"),
    "m8": (True, "method=full gradient_checkpointing=full batch_rows=2"),
    "m9": (True, "packing=false gradient_checkpointing=full micro_batch_rows=2"),
    "m10": (True, "targets=[q_proj,v_proj] rank=8 batch_rows=3 micro_batch_rows=3"),
    "m11": (True, "packing=false method=full batch_rows=2 max_length=640 max_steps=40"),
    "s5": (True, "method=full gradient_checkpointing=full batch_rows=2 packing=false"),
    "t4": (True, "packing=false gradient_checkpointing=full rank=64 batch_rows=16 micro_batch_rows=4"),
    "s10": (True, "batch_rows=3 rank=4 max_length=384"),
    "s11": (True, "packing=false batch_rows=3 gradient_checkpointing=full"),
    "q3": (True, "data.train=builtin:arithmetic batch_rows=8 gradient_checkpointing=full"),
    "s12": (True, "batch_rows=4 dropout=0.1 rank=16"),
    "m12": (True, "batch_rows=6 method=full max_length=768 max_steps=16"),
    "m13": (True, "packing=false rank=64 batch_rows=6 max_steps=16"),
    "m14": (True, "targets=[gate_proj,up_proj,down_proj] batch_rows=8 micro_batch_rows=2 max_steps=16"),
    "s13": (False, "packing=false batch_rows=3 rank=32"),
    "s14": (False, "method=full batch_rows=3"),
    "q4": (False, "data.train=builtin:arithmetic batch_rows=20"),
    "m15": (False, "batch_rows=12 micro_batch_rows=6 rank=4 max_steps=16"),
    "m16": (False, "packing=false method=full gradient_checkpointing=full max_steps=24"),
    "m17": (True, "dropout=0.1 batch_rows=6 max_steps=16"),
    "m18": (True, "dropout=0.05 rank=32 packing=false max_steps=16"),
}
SIX_LAYERS = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
SECTION = {"max_length": "model", "dropout": "lora", "rank": "lora", "targets": "lora"}  # all others: train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSONL to train on")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--memory", action="store_true", help="only memory: other programs run on the machine")
    parser.add_argument("--only", help="names of configurations, comma-separated")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else list(CONFIGURATIONS)
    options.runs.mkdir(parents=True, exist_ok=True)
    found = []
    for name in names:
        folder = options.runs / name
        if not (folder / "run.json").exists():
            train(name, folder, options.rows)
        found.append(compared(name, folder))
        if options.memory:
            found[-1]["forecast_s"] = found[-1]["share"] = None
        told = [
            f"{found[-1][f'forecast_{unit}']} against {found[-1][f'measured_{unit}']} {unit}" for unit in ("gib", "s")
        ]
        print(f"{name}: forecast {', '.join(told)}")
    machine = hardware.detect()
    row = {
        "benchmark": "forecast_error",
        "date": datetime.date.today().isoformat(),
        "git": revision(),
        "hardware": f"{hardware.machine_name(machine)}, {machine.memory_gib:.0f} GiB, no GPU",
        "runs": found,
    }
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return 0


def train(name: str, folder: Path, rows: Path) -> None:
    """Train one configuration in a process of its own."""
    model = MODELS[name[0]]
    tree = folder.parent / "base.yaml"
    tree.write_text("model: {}\ndata: {}\n")
    made = str(six_layers(folder.parent / "six-layers")) if model == "six layers" else model
    settings = [f"model.name={made}", f"data.train={rows}", f"name={name}", f"output_dir={folder}", "overwrite=true"]
    own = [text if "." in text.split("=")[0] else in_section(text) for text in CONFIGURATIONS[name][1].split()]
    settings += [*BASE, "checkpoint.every=never", *own]
    command = [sys.executable, "-m", "fasttune.cli", "train", str(tree), *settings]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def in_section(text: str) -> str:
    return f"{SECTION.get(text.split('=')[0], 'train')}.{text}"


def compared(name: str, folder: Path) -> dict[str, Any]:
    """A finished run: its forecasts beside what it measured, and the share of the matmul rate that it reached."""
    config = configuration.load(folder / "config.yaml")
    measured = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    machine = replace(hardware.detect(), gpus=())
    chosen = autoconfig.resolve(config, machine, Shape.of(pretrained.read_architecture(config.model)))
    data = load.encode(config, pretrained.read_tokenizer(config.model), chosen.packed, lambda what, share: None)
    data.least_shared = sharing.LEAST if chosen.packed else 0
    expected = estimate.of_run(config, chosen, data, machine, None)
    fitted, settings = CONFIGURATIONS[name]
    speed, share, before = measured["tokens_per_s"], None, measured["forecast"]
    timed = before["hours"] is not None and any(
        row["machine"] == hardware.machine_name(machine) for row in estimate.on_file()
    )
    if expected.tokens_per_s is not None:
        sample = estimate.lay_out(data, measured["steps"])
        tflops = estimate.step_flops(config, chosen, sample) * speed * sample.steps / sample.tokens / 1e12
        share = round(tflops / measured["measured_matmul_tflops"], 3)
    return {
        "what": f"{MODELS[name[0]]}: {settings}",
        "fitted": fitted,
        "steps": measured["steps"],
        "tokens": expected.largest_micro_batch_tokens,
        "forecast_gib": round(expected.peak_memory_gib.expected, 3),
        "parts_gib": {part: round(gib, 3) for part, gib in vars(expected.memory_gib).items()},
        "measured_gib": round(measured["peak_memory_gib"], 3),
        "forecast_s": round(3600 * before["hours"]["expected"], 1) if timed else None,
        "measured_s": round(measured["wall_s"], 1),
        "forecast_tokens_per_s": round(before["tokens_per_s"]["expected"], 1) if timed else None,
        "measured_tokens_per_s": round(speed, 1),
        "share": share,
        "machine": hardware.machine_name(machine),
        "dtype": chosen.dtype,
    }


def six_layers(folder: Path) -> Path:
    """A random Llama between the two built-in models, with an untied head: 34 M parameters."""
    if not folder.exists():
        inputs.write_model(folder, SIX_LAYERS)
    return folder


if __name__ == "__main__":
    sys.exit(main())
