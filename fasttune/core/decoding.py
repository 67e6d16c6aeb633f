"""When an answer ends and how it is made: the same for samples, `fasttune generate` and `fasttune eval`."""

from collections.abc import Callable
from typing import Any

from fasttune.data import chat
from fasttune.errors import ModelError

# What a model's own generation_config may put otherwise: greedy means greedy.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    stops: list[int],
    max_new_tokens: int,
    told: Callable[[int], None] | None = None,
    **more: Any,
) -> Any:
    """New ids (B, new) of the answers, in the order of the prompts, which are padded on the left.

    Greedy unless `more`, which goes to `model.generate`, says otherwise. An answer ends with one of `stops`; padding
    follows. told: called at each token with how many there are.
    """
    import torch

    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}  # (B, T); no token types
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        **NEUTRAL,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if told:

        def count(ids: Any, scores: Any) -> Any:
            told(ids.shape[1] - given["input_ids"].shape[1])
            return scores

        settings["logits_processor"] = [count]
    with torch.inference_mode():
        return model.generate(**given, **{**settings, **more})[:, given["input_ids"].shape[1] :]


def refusal(model: Any, tokenizer: Any, text: str) -> str | None:
    """Why a text cannot be given to the model: it is none, or holds a token without an embedding. Else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character ({text[error.start]!a}) is no text: write it as UTF-8, or leave it out"
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) <= rows:
        return None
    largest = max(tokenizer(text, add_special_tokens=False).input_ids, default=0)
    if largest < rows:
        return None
    return f"the model has no embedding for {tokenizer.convert_ids_to_tokens(largest)[:40]!r}: {rows:,} rows, no more"


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: EOS of the model and of the tokenizer, and what the chat template closes a turn with.

    The last is what training has taught; it need not be the EOS of the base model.
    """
    said = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])}
    if not all(isinstance(token, int | None) for token in found):
        raise ModelError(f"generation_config.json: eos_token_id is {str(said)[:50]}; write numbers of tokens")
    if tokenizer.chat_template and (closing := chat.template_of(tokenizer).closing):
        first = tokenizer(closing, add_special_tokens=False).input_ids[:1]
        found |= {token for token in first if token in tokenizer.added_tokens_decoder}
    return sorted(found - {None})
