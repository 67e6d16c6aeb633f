#!/usr/bin/env python3
"""A corpus tokenised by `fasttune tokenize` in each mode, on all cores: how fast, and whether memory stays flat.

    python benchmarks/filipino_text.py --mb 1000 --out text.jsonl
    python benchmarks/corpus.py text.jsonl [--patok-file less.jsonl] [--modes vanilla,patok] [--model MODEL]

Each mode has an empty cache. A line goes to results/corpus/<date>.jsonl: seconds, MB/s, tokens, and the memory of all
its processes together (what no file backs: pages of mapped files can be dropped at any time) at a quarter, at half and
at the end, and the most of all.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from fasttune import hardware
from fasttune.bench.run import revision

ROOT = Path(__file__).resolve().parent.parent
EVERY_S = 2.0


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("file", type=Path)
    top.add_argument("--patok-file", type=Path, help="another file for patok, which is slower")
    top.add_argument("--model", default="builtin:smollm2-135m")
    top.add_argument("--modes", default="vanilla,stochastok,patok")
    top.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/corpus" / f"{datetime.date.today()}.jsonl")
    options = top.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for mode in options.modes.split(","):
        file = options.patok_file if mode == "patok" and options.patok_file else options.file
        row = measure(mode, file.resolve(), options.model)
        with options.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    return 0


def measure(mode: str, file: Path, model: str) -> dict[str, Any]:
    """One mode in a process of its own; its line."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "corpus.yaml")
        affixes = ", affixes: filipino" if mode == "patok" else ""
        config.write_text(f"model: {{name: {model}}}\ndata: {{train: {file}, tokenization: {mode}{affixes}}}\n")
        command = [sys.executable, "-m", "fasttune.cli", "tokenize", str(config), "--out", f"{folder}/tokens", "--json"]
        environment = os.environ | {"FASTTUNE_CACHE": cache_with_models(Path(folder))}
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        samples = [(0.0, 0.0)] * 2  # seconds, MiB
        while process.poll() is None:
            samples.append((time.perf_counter() - started, anonymous_mib(process.pid)))
            time.sleep(EVERY_S)
        seconds = time.perf_counter() - started
        told = json.loads(process.communicate()[0].splitlines()[-1])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    at = {share: next(mib for second, mib in reversed(samples) if second <= share * seconds) for share in (0.25, 0.5)}
    size = file.stat().st_size
    return {
        "benchmark": "corpus",
        "mode": mode,
        "text_mb": round(size / 1e6, 1),
        "documents": told["documents"],
        "tokens": told["tokens"],
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s(after) - cpu_s(before), 1),  # of all cores; the same beside other programs
        "mb_per_s": round(size / 1e6 / seconds, 3),
        "tokens_per_s": round(told["tokens"] / seconds),
        "memory_mib_at_quarter": round(at[0.25]),
        "memory_mib_at_half": round(at[0.5]),
        "memory_mib_at_end": round(samples[-2][1]),  # the last may be of a process that ended
        "memory_mib_most": round(max(mib for _, mib in samples)),
        "model": model,
        "machine": hardware.machine_name(hardware.detect()),
        "load": os.getloadavg()[0],
        "git": revision(),
        "date": f"{datetime.date.today()}",
    }


def cpu_s(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime


def cache_with_models(folder: Path) -> str:
    """An empty cache, but for the built-in models, whose making is no part of this."""
    from fasttune import system

    (folder / "cache").mkdir()
    models = system.cache_root() / "models"
    if models.is_dir():
        (folder / "cache" / "models").symlink_to(models)
    return str(folder / "cache")


def anonymous_mib(pid: int) -> float:
    """Of a process and all below it, pages that no file backs (/proc/PID/smaps_rollup)."""
    found_kib = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for each in family:
        try:
            text = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        found_kib += int(text.partition("Anonymous:")[2].split(maxsplit=1)[0])
    return found_kib / 2**10


if __name__ == "__main__":
    raise SystemExit(main())
