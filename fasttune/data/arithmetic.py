"""builtin:arithmetic: seeded word problems of one step in GSM8K's form (steps, then `#### N`), and when an answer to
such a problem is right.

    rows = generate("train", seed=0, rows=2000)     # {"question": …, "answer": …}

Train and held-out parts are disjoint in their numbers: a problem's part is a hash of its (kind, a, b), so no seed,
count or wording can put the same sum into both. (7 * 8 and 8 * 7 are two sums.)
"""

import hashlib
import random
import re
from typing import Literal

Part = Literal["train", "test"]

NAMES = ["Ana", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam"]
THINGS = ["apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets"]
LARGEST = 60  # of the numbers that are drawn
HELD_OUT_SHARE = 0.1  # of all number pairs

# The first `#### N` counts, without commas; both numbers must then be the same text. Source: `extract_answer` in
# https://github.com/openai/grade-school-math/blob/master/grade_school_math/dataset.py
FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")

Problem = tuple[str, str]  # question, answer


def _add(name: str, thing: str, a: int, b: int) -> Problem:
    question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
    return question, f"{name} starts with {a} {thing} and adds {b}.\n{a} + {b} = {a + b}\n#### {a + b}"


def _subtract(name: str, thing: str, a: int, b: int) -> Problem:
    a = a + b
    question = f"{name} has {a} {thing} and gives away {b} of them. How many {thing} are left?"
    return question, f"{name} starts with {a} {thing} and takes away {b}.\n{a} - {b} = {a - b}\n#### {a - b}"


def _multiply(name: str, thing: str, a: int, b: int) -> Problem:
    a, b = a % 11 + 2, b % 11 + 2
    question = f"{name} fills {a} boxes with {b} {thing} each. How many {thing} are there in total?"
    return question, f"There are {a} boxes with {b} {thing} each.\n{a} * {b} = {a * b}\n#### {a * b}"


KINDS = {"add": _add, "subtract": _subtract, "multiply": _multiply}


def generate(part: Part, seed: int = 0, rows: int = 2000) -> list[dict[str, str]]:
    """`rows` problems of the part, with numbers from 2 to LARGEST; the same arguments give the same rows."""
    rng = random.Random(f"{part}-{seed}")
    found: list[dict[str, str]] = []
    while len(found) < rows:
        kind = rng.choice(list(KINDS))
        a, b = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        question, answer = KINDS[kind](name, thing, a, b)
        if part_of(answer) == part:
            found.append({"question": question, "answer": answer})
    return found


def part_of(answer: str) -> Part:
    """Which part a problem belongs to: by a hash of its sum (the line with the `=`), whatever the wording."""
    equation = next(line for line in answer.splitlines() if "=" in line)
    share = int.from_bytes(hashlib.sha256(equation.encode()).digest()[:4], "big") / 2**32
    return "test" if share < HELD_OUT_SHARE else "train"


def final_number(text: str) -> str | None:
    """The number after the first `####`, without commas; None where there is none."""
    found = FINAL_NUMBER.search(text)
    return found.group(1).replace(",", "") if found else None


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer ends as the data set's does. A reference without `#### N` is never matched."""
    number = final_number(reference)
    return number is not None and final_number(answer) == number


def accuracy(answers: list[str], references: list[str]) -> float | None:
    """Share of right answers, 0 to 1; None where there is nothing to answer."""
    right = [is_right(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return sum(right) / len(right) if right else None
