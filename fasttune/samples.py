"""Held-out problems, answered greedily: what a person compares before and after training."""

from dataclasses import dataclass
from typing import Any

from fasttune import model as models  # first: it imports unsloth

import torch

from fasttune.config import Config
from fasttune.data import formats, sources, tokens

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Problem:
    """What is asked (as a person reads it), the rendered prompt, and the answer of the data set."""

    question: str
    prompt: str
    reference: str


def read(config: Config, tokenizer: Any) -> list[Problem]:
    """The first `config.samples` held-out conversations; plain text rows have no question and are left out."""
    if not config.samples or config.data.eval is None:
        return []
    problems = []
    for number, row in enumerate(sources.read(config.data.eval, "test", config.data.split, config.samples), 1):
        messages = formats.conversation(formats.rename(row, config.data.columns), number)
        if isinstance(messages, str):
            continue
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        question = messages[last - 1]["content"] if last else ""
        problems.append(Problem(question, tokens.prompt_text(messages, tokenizer), messages[last]["content"]))
    return problems


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
