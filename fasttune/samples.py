"""Held-out problems, answered greedily: what a person compares before and after training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fasttune import model as models  # first: it imports unsloth

import torch

from fasttune.config import Config
from fasttune.data import chat, formats, sources
from fasttune.data.batches import Batches
from fasttune.data.formats import Row

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Problem:
    """What is asked (as a person reads it), the rendered prompt, and the answer of the data set."""

    question: str
    prompt: str
    reference: str


def read(config: Config, tokenizer: Any, batches: Batches) -> list[Problem]:
    """The first `config.samples` held-out conversations; plain text rows have no question and are left out."""
    problems = []
    for place, row in _held_out(config, batches):
        row = formats.rename(row, config.data.columns, place)
        form = config.data.format if config.data.format != "auto" else formats.detect(row, place)
        try:
            conversation = formats.convert(row, form, place)
        except formats.Unusable:
            continue
        if isinstance(conversation, str) or not conversation.answers:
            continue
        messages, last = conversation.messages, conversation.answers[-1]
        question = messages[last - 1]["content"]
        problems.append(Problem(question, chat.prompt(messages, tokenizer), messages[last]["content"]))
    return problems


def _held_out(config: Config, batches: Batches) -> Iterator[tuple[str, Row]]:
    """(place, row): the first rows of data.eval, or the first that data.eval_share holds out of the first data set."""
    data = config.data
    if not config.samples:
        return
    if data.eval is not None:
        for _, place, row in sources.first_rows(data.eval, "test", data.split, config.samples):
            yield place, row
        return
    part, held_out = batches.parts[0], batches.split[0][1]
    wanted = set(part.numbers[held_out[: config.samples]].tolist())
    rows = sources.first_rows(part.source, "train", data.split, max(wanted, default=0))
    yield from ((place, row) for number, place, row in rows if number in wanted)


def answer(model: Any, tokenizer: Any, problems: list[Problem], checkpointing: str) -> list[str]:
    """The model's greedy answers, at most MAX_NEW_TOKENS each; the model is left ready for training."""
    if not problems:
        return []
    models.for_inference(model)
    tokenizer.padding_side = "left"
    prompts = [problem.prompt for problem in problems]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)  # (B, T)
    with torch.inference_mode():
        out = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    tokenizer.padding_side = "right"
    models.for_training(model, checkpointing)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
