"""Benchmarks of what a model knows of the inside of words, asked and scored as their authors do: PACUTE and
hierarchical (Filipino), LangGame and multi-digit addition (StochasTok's), CUTE. Users bring the files: `--data FOLDER`.

Sources: https://github.com/raileymontalan/filipino-morphology-llm  https://github.com/anyasims/stochastok
https://github.com/Leukas/CUTE  (what of theirs is not followed, and why: docs/eval.md)
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune.data.formats import Row
from fasttune.errors import DataError, FasttuneError
from fasttune.tools import tasks

NEW_TOKENS = 50  # of a generated answer, as in the authors' code
QUOTE = '"'


@dataclass(frozen=True)
class Form:
    """Where a row of a file has its parts, as keys joined by dots. options: None where the answer is to be written."""

    file: str
    prompt: str
    answer: str
    options: str | None = None
    rule: str = "equal"  # of a written answer: equal, quoted (up to the next quote) or contained


def _forms() -> dict[str, Form]:
    forms = {}
    for name in ("affixation", "composition", "manipulation", "syllabification"):
        inside = "prompts.0.mcq_options"
        forms[f"pacute_{name}"] = Form(f"{name}_mcq.jsonl", "prompts.0.text_en", f"{inside}.correct", inside)
        forms[f"pacute_{name}_gen"] = Form(f"{name}_gen.jsonl", "prompts.0.text_en", "label")
    for name, file, prompt, rule in (
        ("hierarchical", "hierarchical", "prompt_tl", "equal"),
        ("langgame", "langgame", "question", "equal"),
        ("addition", "multi_digit_addition", "question", "contained"),
    ):
        forms[name] = Form(f"{file}_mcq.jsonl", prompt, "answer", "options")
        forms[f"{name}_gen"] = Form(f"{file}_gen.jsonl", prompt, "answer", rule=rule)
    return forms | {"cute": Form("cute_gen.jsonl", "question", "answer", rule="quoted")}


FORMS = _forms()
NAMES = tuple(FORMS)
CHOICES = tuple(name for name, form in FORMS.items() if form.options)
GROUPS = {
    "pacute": tuple(name for name in CHOICES if name.startswith("pacute")),
    "filipino": (*CHOICES, "cute"),  # what the authors compare their models on
    "filipino_mcq": CHOICES,
    "filipino_gen": tuple(name for name in NAMES if name not in CHOICES),
}


def check(folder: str | None, names: list[str]) -> None:
    """Raise FasttuneError where `folder` is none, DataError where it lacks the file of a task."""
    if folder is None:
        raise FasttuneError(f"--tasks {names[0]}: needs its files; add --data FOLDER that holds {FORMS[names[0]].file}")
    if not Path(folder).is_dir():
        raise DataError(f"--data {folder}: is no folder; --tasks {names[0]} reads {FORMS[names[0]].file} in it")
    for name in names:
        if not Path(folder, FORMS[name].file).is_file():
            raise DataError(f"--data {folder}: has no {FORMS[name].file}, which --tasks {name} reads; put it there")


def config(name: str) -> dict[str, Any]:
    """The task as the harness takes it; --data becomes part of its metadata."""
    form = FORMS[name]
    how: dict[str, Any] = {
        "task": name,
        "custom_dataset": rows,
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "metadata": {"version": 1.0, "name": name},
    }
    if form.options:
        right, how["output_type"], how["target_delimiter"] = "acc", "multiple_choice", " "
        how |= {"doc_to_choice": "options", "doc_to_target": "right"}
    else:
        right, how["output_type"] = ("contained" if form.rule == "contained" else "exact_match"), "generate_until"
        until = [QUOTE] if form.rule == "quoted" else []
        how["generation_kwargs"] = {"until": until, "do_sample": False, "max_gen_toks": NEW_TOKENS}
        how["process_results"] = score_contained if form.rule == "contained" else score_equal
    return how | {"metric_list": [{"metric": right, "aggregation": "mean", "higher_is_better": True}]}


def rows(name: str, data: str, **_: Any) -> dict[str, Any]:
    """The problems of a task: id, prompt, answer, and for multiple choice options and `right`, the index of the answer.

    Raises DataError for a row that cannot be asked.
    """
    form, found = FORMS[name], []
    source = str(Path(data, form.file))
    for place, row in tasks.read(source, "train", None):
        prompt, answer = _text(row, form.prompt, place), _text(row, form.answer, place).strip()
        problem: Row = {"id": tasks.id_of(row), "prompt": prompt, "answer": answer}
        if form.rule == "quoted":
            problem["prompt"] = f"{prompt} Answer: {QUOTE}"
        if form.options:
            options = _options(row, form.options, place)
            if answer not in options:
                raise DataError(f"--data: {place}: the answer {answer[:60]!r} is none of its options; correct the row")
            # Of equal options the first: argmax takes that one.
            problem |= {"options": options, "right": options.index(answer)}
        found.append(problem)
    return tasks.test_split(found, source)


def score_equal(doc: Row, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(compared(results[0]) == compared(doc["answer"]))}


def score_contained(doc: Row, results: list[str]) -> dict[str, float]:
    return {"contained": float(compared(doc["answer"]) in compared(results[0]))}


def compared(text: str) -> str:
    """What of a written answer counts."""
    return text.strip().lower()


def _options(row: Row, path: str, place: str) -> list[str]:
    """As text, in an order that knows nothing of the answer.

    In two of the files the answer always stands first, where it would win every draw (half precision has many).
    """
    held = _at(row, path, place)
    keys = list(held) if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else []
    options = [_text(row, f"{path}.{key}", place).strip() for key in keys]
    if len(options) < 2:
        raise DataError(f"--data: {place}: {path} is {str(held)[:60]!r}, expected two options or more; correct the row")
    return sorted(options, key=lambda option: hashlib.sha256(option.encode("utf-8", "replace")).digest())


def _text(row: Row, path: str, place: str) -> str:
    """Text, or a whole number as text: 200 rows have such options."""
    value = _at(row, path, place)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (isinstance(value, str) and value.strip()):
        raise DataError(f"--data: {place}: {path} is {str(value)[:60]!r}, expected text; correct the row")
    return str(value)


def _at(row: Row, path: str, place: str) -> Any:
    value: Any = row
    for key in path.split("."):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            has = ", ".join(row)[:120] or "nothing"
            raise DataError(
                f"--data: {place} has no {path} (it has {has}); put the file there as its authors publish it"
            ) from None
    return value
