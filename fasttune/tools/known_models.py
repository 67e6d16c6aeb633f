"""The shapes of well-known models, for a plan where the hub cannot be reached or does not give this person the model.

    architecture, tokenizer, assumed = read(config.model)       # the model's own, wherever they can be had

known_models.json holds what their config.json says, and how many tokens their tokenizers make of English for one of
SmolLM2's, which is built in and counts in their place.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fasttune import hub
from fasttune.core import pretrained
from fasttune.data import chat_templates
from fasttune.errors import HubError
from fasttune.metrics import Forecast, Range, Setting
from fasttune.settings import ModelConfig

COUNTS = "builtin:smollm2-135m"  # whose tokenizer stands in for one that is not to be had


@dataclass(frozen=True)
class Known:
    """parameters: the published number. tokens: for one of COUNTS, the least and the most that were measured."""

    parameters: int
    tokens: tuple[float, float]
    chat_template: str | None  # of chat_templates.NAMES; None: the model brings none
    config: dict[str, Any]  # what config.json says, by its names


@dataclass(frozen=True)
class Assumed:
    """What is not the model's own, said line by line. tokens: for one that was counted, where another tokenizer did."""

    settings: list[Setting] = field(default_factory=list)
    tokens: Range | None = None


@cache
def all_of_them() -> dict[str, Known]:
    """Hub id → what is known of it."""
    found = _file()
    return {
        name: Known(model["parameters"], tuple(found["tokenizers"][model["tokenizer"]]), template, model["config"])
        for model in found["models"]
        for name, template in model["models"].items()
    }


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def read(model: ModelConfig) -> tuple[Any, Any, Assumed]:
    """(architecture, tokenizer, what of the two is not the model's own). Raises ModelError as the hub's files do where
    the model is not known, or another revision of it is asked for.
    """
    settings, tokens = list[Setting](), None
    known = all_of_them().get(model.name) if model.revision is None else None
    try:
        architecture = pretrained.read_architecture(model)
    except HubError:
        if known is None:
            raise
        architecture = SimpleNamespace(**known.config)
        architecture.vocab_size += len(model.added_tokens)
        settings.append(
            Setting("shape", "from fasttune's own list", f"of {_file()['date']}, not the hub's: {_why(model.name)}")
        )
    try:
        return architecture, pretrained.read_tokenizer(model), Assumed(settings)
    except HubError:
        if known is None:
            raise
    low, high = known.tokens
    tokens = Range(low, math.sqrt(low * high), high)
    what = f"counted by {COUNTS}'s tokenizer" + ("" if low == high else f", × {tokens.expected:.2f}")
    why = f"the model's own makes {low:.2f} to {high:.2f} for one of these in English text: an estimate"
    settings.append(Setting("tokens", what, why))
    return architecture, _stand_in(known, model.added_tokens), Assumed(settings, tokens)


def scaled(expected: Forecast, tokens: Range | None) -> Forecast:
    """A forecast whose tokens another tokenizer has counted: tokens, hours and dollars are so many times as many.

    Memory is left as it is: it is that of full rows, or too high by as much.
    """
    if tokens is None:
        return expected

    def times(values: Range | None) -> Range | None:
        if values is None:
            return None
        return Range(values.low * tokens.low, values.expected * tokens.expected, values.high * tokens.high)

    count = round(expected.tokens * tokens.expected)
    return replace(expected, tokens=count, hours=times(expected.hours), usd=times(expected.usd))


def _why(name: str) -> str:
    """The hub's config is not to be had."""
    import huggingface_hub

    if said := hub.away():
        return f"it cannot be reached ({said})"
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"it is gated; accept its licence at https://huggingface.co/{name}, then `hf auth login`"


def _stand_in(known: Known, added: Sequence[str]) -> Any:
    """The tokenizer of COUNTS, with the model's template and, as one token each, the control tokens of all of them and
    those of model.added_tokens.
    """
    tokenizer = pretrained.read_tokenizer(ModelConfig(name=str(pretrained.builtin_tokenizer(COUNTS))))
    named = {
        token for name in chat_templates.NAMES for token in chat_templates.CONTROL.findall(chat_templates.read(name))
    }
    tokenizer.add_tokens(sorted(named), special_tokens=True)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = chat_templates.read(known.chat_template) if known.chat_template else None
    return tokenizer
