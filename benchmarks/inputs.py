#!/usr/bin/env python3
"""What the battery trains on, made on the spot and kept in the cache: python benchmarks/inputs.py model|rows [--tiny]

model  the architecture of Llama-3.1-8B with random bf16 weights (speed and memory do not depend on their values) and
       the byte-level tokenizer of builtin:tiny; --tiny: the same form with two small layers
rows   JSONL files of generated text, where a character is a token: full rows, rows as long as GSM8K's and Alpaca's, and
       those of GSM8K behind one long prompt

The last line of stdout is a JSON document with the folder.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Source: https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
# Median and sigma of log-normal lengths, in tokens, of question and answer.
# gsm8k: 3,000 rows of its training split (https://github.com/openai/grade-school-math), tokenizer of SmolLM2.
# alpaca: fits the mean row of https://huggingface.co/datasets/tatsu-lab/alpaca (47.8 MB, 52,002 rows, its preamble of
# about 40 tokens included) at 4.4 characters a token; the spread is our assumption.
LENGTHS = {
    "gsm8k": {"question": (56, 0.35), "answer": (112, 0.42)},
    "alpaca": {"question": (58, 0.30), "answer": (35, 1.05)},
}
FULL = {"full-4096": (4096, 160), "full-1024": (1024, 400)}  # tokens of a row, the one that ends it included; rows
ROWS = 2000
SHARED_PROMPT = 880  # tokens, before every question of gsm8k's lengths
LONGEST = 1500  # tokens of a question or an answer
SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["model", "rows"])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    from fasttune import system

    if options.what == "rows":
        made = system.cached_folder("battery/rows-2", write_rows)
    elif options.tiny:
        made = system.cached_folder("battery/model-tiny", lambda folder: write_model(folder, LLAMA_31_8B | TINY))
    else:
        made = system.cached_folder("battery/model-8b", lambda folder: write_model(folder, LLAMA_31_8B))
    print(json.dumps({"files": {path.name: path.stat().st_size for path in sorted(made.iterdir())}}))
    return 0


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A model folder with random weights: bf16, or fp32 without a GPU."""
    import torch
    import transformers

    from fasttune.core import pretrained

    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(sizes | ids))
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """One JSONL file a kind of row, the same on every machine."""
    for name, (tokens, count) in FULL.items():
        rng = random.Random(f"{SEED} {name}")
        _write(folder / f"{name}.jsonl", ({"text": text(rng, tokens - 1)} for _ in range(count)))
    for name in LENGTHS:
        _write(folder / f"{name}.jsonl", pairs(name, ROWS))
    prompt = text(random.Random(f"{SEED} prompt"), SHARED_PROMPT)
    behind = ({**row, "question": f"{prompt} {row['question']}"} for row in pairs("gsm8k", ROWS))
    _write(folder / "shared-prompt.jsonl", behind)


def pairs(name: str, count: int) -> Iterator[dict[str, str]]:
    """Questions and answers with the lengths of a known data set, seeded."""
    rng = random.Random(f"{SEED} {name}")
    for _ in range(count):
        yield {column: text(rng, length(rng, *shape)) for column, shape in LENGTHS[name].items()}


def length(rng: random.Random, median: float, sigma: float) -> int:
    return min(LONGEST, max(1, round(median * rng.lognormvariate(0, sigma))))


def text(rng: random.Random, characters: int) -> str:
    """Words of random letters; exactly so many characters, none of them white space at an end."""
    made = "".join(rng.choices("etaoinshrdlu    ", k=characters))
    return f"x{made[1:-1]}x"[:characters]


def _write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
