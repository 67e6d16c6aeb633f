"""When an answer ends and how it is made: the same for samples, `fasttune generate` and `fasttune eval`."""

from typing import Any

from fasttune.data import chat
from fasttune.data.formats import Unusable

# What a model's own generation_config may put otherwise: greedy means greedy.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


def greedy(tokenizer: Any, stops: list[int], max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `model.generate` for greedy answers that end at one of `stops`."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        **NEUTRAL,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id,
    }


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: EOS of the model and of the tokenizer, and what the chat template closes a turn with.

    The last is what training has taught; it need not be the EOS of the base model.
    """
    said = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])}
    if tokenizer.chat_template:
        try:
            rest = chat.template_of(tokenizer).render(chat.PROBE).rpartition(chat.PROBE_ANSWER)[2].strip()
        except Unusable:
            rest = ""
        first = tokenizer(rest, add_special_tokens=False).input_ids[:1] if rest else []
        found |= {token for token in first if token in tokenizer.added_tokens_decoder}
    return sorted(found - {None})
