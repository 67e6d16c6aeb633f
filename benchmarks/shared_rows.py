#!/usr/bin/env python3
"""Rows that begin alike, made of GSM8K's:  python benchmarks/shared_rows.py system|answers TRAIN.jsonl OUT.jsonl

system   every question behind the same system prompt of solved examples, about 880 tokens of SmolLM2
answers  every question behind the same two examples (about 300 tokens with it), and eight wordings of its answer

TRAIN.jsonl has a question and an answer in each row: https://github.com/openai/grade-school-math. Seeded.
"""

import argparse
import json
import random
import sys
from pathlib import Path

SEED = 0
EXAMPLES = {"system": (2, 7), "answers": (0, 2)}  # rows of the file that are solved before each question
FIRST = 7  # row that is a question
OPENINGS = ["", "Let us go through it. ", "Step by step: ", "Here is how. ", "We count. ", "Think first. "]
OPENINGS += ["The way to it: ", "In order: "]
LINES = {"system": 2000, "answers": 300}  # questions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(EXAMPLES))
    parser.add_argument("train", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.train.read_text(encoding="utf-8").splitlines()]
    examples = rows[slice(*EXAMPLES[options.kind])]
    solved = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in examples)
    system = f"You solve problems of arithmetic, and end with the number behind ####.\n\n{solved}"
    wordings = OPENINGS if options.kind == "answers" else OPENINGS[:1]
    made = []
    for row in rows[FIRST : FIRST + LINES[options.kind]]:
        for opening in wordings:
            contents = zip(
                ("system", "user", "assistant"), (system, row["question"], opening + row["answer"]), strict=True
            )
            made.append({"messages": [{"role": role, "content": text} for role, text in contents]})
    random.Random(SEED).shuffle(made)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
