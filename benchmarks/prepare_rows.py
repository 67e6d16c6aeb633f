#!/usr/bin/env python3
"""How fast rows become tokens, against the raw rate of the tokenizer, and what that takes in memory.

    python benchmarks/prepare_rows.py rate  [--rows 40000] [--repeats 5] [--file rows.jsonl] [--out …]
    python benchmarks/prepare_rows.py scale [--sizes 10000 100000 1000000] [--out …]

rate   `tokenizers`' encode_batch on all cores, on texts that are rendered already, against the whole way from the JSONL
       file to the cache on disk (read, parse, render, encode, label, write), interleaved, each in a fresh process
scale  seconds and peak memory (this process and its workers together) of the whole way, by number of rows

Rows are generated (about 1 KB each) unless --file gives some: question and answer.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MODEL = "builtin:smollm2-135m"
WORDS = 30_000
BATCH = 1000


def main() -> int:
    options = parser().parse_args()
    if options.what in ("raw", "prepare"):
        print(json.dumps(raw(options.file) if options.what == "raw" else prepare(options.file)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        row = rate(options, Path(scratch)) if options.what == "rate" else scale(options, Path(scratch))
    row = {"benchmark": f"prepare_rows {options.what}", "date": datetime.now(UTC).strftime("%Y-%m-%d")} | row | where()
    print(json.dumps(row, indent=1))
    if options.out:
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("what", choices=["rate", "scale", "raw", "prepare"])
    top.add_argument("--rows", type=int, default=40_000)
    top.add_argument("--repeats", type=int, default=5)
    top.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    top.add_argument("--file")
    top.add_argument("--out")
    return top


def rate(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Rows per second of both ways, their ratio of medians."""
    path = Path(options.file) if options.file else write_rows(scratch / "rows.jsonl", options.rows)
    found: dict[str, list[float]] = {"raw": [], "prepare": []}
    for _ in range(options.repeats):
        for what, values in found.items():
            result = fresh(what, path, scratch)
            values.append(result["rows"] / result["seconds"])
            print(f"{what}: {values[-1]:,.0f} rows/s", file=sys.stderr)
    ratio = statistics.median(found["prepare"]) / statistics.median(found["raw"])
    return {"rows": result["rows"], "bytes": path.stat().st_size, "rows_per_s": found, "prepare_over_raw": ratio}


def scale(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds and peak memory by number of rows."""
    sizes = []
    for rows in options.sizes:
        path = write_rows(scratch / "rows.jsonl", rows)
        result = fresh("prepare", path, scratch) | {"bytes": path.stat().st_size}
        result["again_s"] = fresh("prepare", path, scratch, keep=True)["seconds"]
        print(json.dumps(result), file=sys.stderr)
        sizes.append(result)
    return {"sizes": sizes}


def fresh(what: str, path: Path, scratch: Path, keep: bool = False) -> dict[str, Any]:
    """One measurement in a fresh process; its cache of rows is emptied first, unless `keep`."""
    from fasttune.core import pretrained

    pretrained.builtin(MODEL)
    cache = scratch / "cache"
    if not keep:
        subprocess.run(["rm", "-rf", str(cache / "data")], check=True)
    models = Path(pretrained.builtin(MODEL)).parent
    cache.mkdir(exist_ok=True)
    if not (cache / "models").exists():
        (cache / "models").symlink_to(models)
    environment = os.environ | {"FASTTUNE_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, what, "--file", str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def raw(file: str) -> dict[str, Any]:
    """encode_batch alone, on the same texts, in batches of BATCH; the texts lie in memory."""
    from fasttune.core import pretrained
    from fasttune.data import chat, formats, sources
    from fasttune.settings import ModelConfig

    tokenizer = pretrained.read_tokenizer(ModelConfig(name=MODEL))
    template = chat.template_of(tokenizer)
    texts = [
        template.text(formats.convert(row, "question_answer", place), "assistant", place)[0]
        for chunk in sources.read(file, "train")
        for _, place, row in chunk.numbered()
    ]
    backend = tokenizer.backend_tokenizer
    started = time.perf_counter()
    for at in range(0, len(texts), BATCH):
        backend.encode_batch(texts[at : at + BATCH], add_special_tokens=False)
    return {"rows": len(texts), "seconds": time.perf_counter() - started}


def prepare(file: str) -> dict[str, Any]:
    """The whole way, as `fasttune train` and `fasttune data` go it."""
    from fasttune import config
    from fasttune.core import pretrained
    from fasttune.data import load

    settings = config.parse({"model": {"name": MODEL, "max_length": 2048}, "data": {"train": file}})
    tokenizer = pretrained.read_tokenizer(settings.model)
    with Peak() as peak:
        started = time.perf_counter()
        batches = load.encode(settings, tokenizer, packed=True, progress=lambda what, share: None)
        seconds = time.perf_counter() - started
        counts = batches.parts[0].counts
    return {"rows": counts["rows"], "tokens": counts["tokens"], "seconds": seconds, "peak_gib": peak.bytes / 2**30}


class Peak:
    """Largest memory of this process and its children together, pages that they share counted once (PSS)."""

    bytes = 0

    def __enter__(self) -> "Peak":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._stop.wait(1.0):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                with suppress(OSError, KeyError):  # it has just ended
                    total += _own_bytes(process.pid)
            self.bytes = max(self.bytes, total)


def _own_bytes(pid: int) -> int:
    """PSS without the pages of mapped files: those are the kernel's cache, given back when memory is wanted.

    The rolled-up form: a full list of mappings would take so long to read that it slows what is measured.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return (kib["Pss"] - kib["Pss_File"]) * 1024


def write_rows(path: Path, rows: int) -> Path:
    """Seeded text with the word frequencies of a language (Zipf), question and answer, about 1 KB a row."""
    rng = random.Random(0)
    syllables = [c + v + e for c in "bcdfghklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "s", "t")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, rows, BATCH):
            drawn = rng.choices(words, weights, k=150 * min(BATCH, rows - start))
            for at in range(0, len(drawn), 150):
                question, answer = " ".join(drawn[at : at + 60]) + "?", " ".join(drawn[at + 60 : at + 150])
                file.write(json.dumps({"question": question, "answer": f"{answer}.\n#### {at}"}) + "\n")
    return path


def where() -> dict[str, Any]:
    from fasttune import hardware, system
    from fasttune.bench.run import revision

    machine = hardware.line(hardware.detect(Path.cwd()))
    return {"hardware": machine, "versions": system.versions(), "git": revision()}


if __name__ == "__main__":
    sys.exit(main())
