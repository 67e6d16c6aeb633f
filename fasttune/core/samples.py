"""Held-out problems, answered greedily: what a person compares before and after training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fasttune.core import decoding, model as models  # model first: it imports unsloth
from fasttune.config import Config
from fasttune.data import arithmetic, chat, formats, load, sources
from fasttune.data.batching import Batches
from fasttune.data.formats import Row
from fasttune.errors import DataError
from fasttune.metrics import ExactMatch, Sample

ROWS_AT_ONCE = 40
LEAST_NEW_TOKENS, MOST_NEW_TOKENS = 64, 512


@dataclass(frozen=True)
class Problem:
    """What is asked (as a person reads it), the rendered prompt, and the answer of the data set."""

    question: str
    prompt: str
    reference: str


def read(config: Config, tokenizer: Any, batches: Batches, warn: Callable[[str], None]) -> list[Problem]:
    """The first held-out conversations, as many as are shown or scored; plain text rows have no question and are left
    out, and with a warning those whose question alone is longer than `model.max_length`. Raises DataError where one is
    to be scored and its reference holds no `#### N`.
    """
    template, problems, too_long = chat.template_of(tokenizer), list[Problem](), 0
    form, columns = "", dict[str, str]()
    for place, row in _held_out(config, batches):
        if not form:
            form, columns = load.form_by(config, _source(config, batches)[0], row, place)
        row = formats.rename(row, columns, place)
        try:
            conversation = formats.convert(row, form, place)
            if isinstance(conversation, str) or not conversation.answers:
                continue
            messages, last = conversation.messages, conversation.answers[-1]
            prompt = template.prompt(messages[:last], conversation.tools)
        except formats.Unusable:
            continue
        formats.check_text(prompt, place)
        question, reference = (messages[at]["content"] or "" for at in (last - 1, last))
        scored = len(problems) < config.eval.problems
        if scored and arithmetic.final_number(reference) is None:
            raise DataError(
                f"eval.problems: {place}: its answer holds no `#### N`, so none can be checked; set eval.problems=0"
            )
        if len(tokenizer(prompt, add_special_tokens=False).input_ids) > config.model.max_length:
            too_long += 1
            continue
        problems.append(Problem(question, prompt, reference))
    if too_long:
        warn(
            f"{too_long} of the held-out problems are not asked: longer than model.max_length={config.model.max_length}"
        )
    return problems


def _held_out(config: Config, batches: Batches) -> Iterator[tuple[str, Row]]:
    """(place, row): the first rows of data.eval, or the first that data.eval_share holds out of the first data set."""
    data, count = config.data, max(config.samples, config.eval.problems)
    if not count:
        return
    source, split = _source(config, batches)
    if data.eval is not None:
        rows = sources.first_rows(source, "test", split, count, data.streaming, data.columns.values())
        yield from ((place, row) for _, place, row in rows)
        return
    part, held_out = batches.parts[0], batches.split[0][1]
    wanted = set(part.numbers[held_out[:count]].tolist())
    last = max(wanted, default=0)
    rows = sources.first_rows(source, "train", split, last, data.streaming, data.columns.values())
    yield from ((place, row) for number, place, row in rows if number in wanted)


def _source(config: Config, batches: Batches) -> tuple[str, str]:
    """(source, split) of the held-out problems."""
    data = config.data
    return (data.eval, data.held_out_split) if data.eval is not None else (batches.parts[0].source, data.split)


def answer(model: Any, tokenizer: Any, problems: list[Problem], checkpointing: str) -> list[str]:
    """The model's greedy answers, each at most half as long again as the longest reference (and 16 tokens more).

    The model is left ready for training.
    """
    if not problems:
        return []
    longest = max(map(len, tokenizer([problem.reference for problem in problems]).input_ids))
    room = min(max(longest + longest // 2 + 16, LEAST_NEW_TOKENS), MOST_NEW_TOKENS)
    models.for_inference(model)
    texts, stops = [], decoding.stop_ids(model, tokenizer)
    for start in range(0, len(problems), ROWS_AT_ONCE):
        prompts = [problem.prompt for problem in problems[start : start + ROWS_AT_ONCE]]
        ids = decoding.generate(model, tokenizer, prompts, stops, room)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    models.for_training(model, checkpointing)
    return texts


def exact_match(model: Any, tokenizer: Any, problems: list[Problem], checkpointing: str) -> float | None:
    """Share of the problems that the model answers rightly now; None for none."""
    texts = answer(model, tokenizer, problems, checkpointing)
    return arithmetic.accuracy(texts, [problem.reference for problem in problems])


def compare(
    config: Config, problems: list[Problem], before: list[str], after: list[str]
) -> tuple[list[Sample], ExactMatch | None]:
    """(the samples to show, the exact match on the first `eval.problems`; None where none were asked for)."""
    shown = [
        Sample(problem.question, problem.reference, old, new)
        for problem, old, new in zip(problems, before, after, strict=True)
    ][: config.samples]
    count = min(config.eval.problems, len(problems))
    if not count:
        return shown, None
    references = [problem.reference for problem in problems[:count]]
    then, now = (arithmetic.accuracy(texts[:count], references) for texts in (before, after))
    return shown, ExactMatch(count, then or 0.0, now or 0.0)
