#!/usr/bin/env python3
"""How fast text becomes tokens in each mode, on one core: stochastok and patok against plain.

    python benchmarks/filipino_text.py --mb 5 --out text.jsonl
    python benchmarks/tokenize_speed.py text.jsonl --tokenizer tokenizer.json [--affixes filipino] [--repeats 5]

Modes are interleaved; each tokenises the same documents with nothing remembered. Seconds are processor time, of plain
tokenising and what a mode adds to it. tokens_per_s counts the tokens of plain tokenising in every mode, since one that
makes more of them is not faster for it. The last line of stdout is a JSON document with all values.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer

from fasttune.data.affix_lists import affixes_of
from fasttune.data.subword import Splitter, Splitting

BATCH = 256  # documents that are encoded at a time, as the corpus does


def main() -> int:
    options = parser().parse_args()
    texts = list(documents(options.file))
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    tokenizer.encode_special_tokens = True  # text that looks like a control token stays text
    affixes = affixes_of(options.affixes)
    ways = {"plain": None, "stochastok": Splitting("stochastok"), "patok": Splitting("patok", affixes=affixes)}
    seconds: dict[str, list[float]] = {mode: [] for mode in ways}  # of processor time
    tokens, splitters = {}, {}
    for repeat in range(options.repeats):
        for mode, how in ways.items():
            # A fresh one: it must not know the words from the repeat before.
            splitters[mode] = Splitter(tokenizer, how) if how else None
            before = time.process_time()
            tokens[mode] = tokenise(tokenizer, splitters[mode], texts)
            seconds[mode].append(time.process_time() - before)
            print(f"{repeat + 1}/{options.repeats}  {mode:<10}  {seconds[mode][-1]:8.2f} s", file=sys.stderr)
    print(json.dumps(row(options, texts, seconds, tokens, splitters)))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument(
        "file", type=Path, help="JSONL with `text`, or plain text with blank lines between documents (.txt)"
    )
    top.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    top.add_argument("--affixes", default="filipino")
    top.add_argument("--repeats", type=int, default=5)
    return top


def documents(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        yield from filter(None, text.split("\n\n"))
    else:
        yield from (json.loads(line)["text"] for line in text.splitlines())


def tokenise(tokenizer: Tokenizer, splitter: Splitter | None, texts: list[str]) -> int:
    """How many tokens the documents have."""
    total = 0
    for start in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        for number, encoding in enumerate(encodings, start):
            ids = encoding.ids
            if splitter:
                ids = splitter.apply(ids, np.random.default_rng((0, 0, number)))
            total += len(ids)
    return total


def row(
    options: argparse.Namespace,
    texts: list[str],
    seconds: dict[str, list[float]],
    tokens: dict[str, int],
    splitters: dict[str, Splitter | None],
) -> dict[str, Any]:
    size = sum(len(text.encode()) for text in texts)
    plain = statistics.median(seconds["plain"])
    modes = {}
    for mode, values in seconds.items():
        middle, splitter = statistics.median(values), splitters[mode]
        modes[mode] = {
            "mb_per_s": round(size / 1e6 / middle, 3),
            "tokens_per_s": round(tokens["plain"] / middle),
            "share_of_plain": round(plain / middle, 3),
            "tokens_to_plain": round(tokens[mode] / tokens["plain"], 4),
            "seconds": [round(value, 3) for value in values],
            "counts": dict(splitter.counts.most_common()) if splitter else {},
        }
    return {
        "benchmark": "tokenize_speed",
        "file": options.file.name,
        "tokenizer": str(options.tokenizer),
        "bytes": size,
        "documents": len(texts),
        "tokens": tokens["plain"],
        "modes": modes,
        "load": os.getloadavg()[0],
        "tokenizers": version("tokenizers"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
