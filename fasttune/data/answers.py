"""When an answer is right: the rule of GSM8K, which builtin:arithmetic follows. Pure functions, no model.

The first `#### N` counts, without commas; both numbers must then be the same text.
Source: `extract_answer` in https://github.com/openai/grade-school-math/blob/master/grade_school_math/dataset.py
"""

import re

FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


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
