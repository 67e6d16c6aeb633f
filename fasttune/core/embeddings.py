"""Embeddings and head that are trained beside an adapter, all of their weights (lora.train_embeddings), and rows of
both for tokens that are added (model.added_tokens).

PEFT puts a copy that is trained beside each of the two, which stay frozen (modules_to_save), and Unsloth trains those.
Where the head is the embedding (tied) the copy is one tensor too, so what is saved fits the tied model.
Sources: https://unsloth.ai/docs/basics/continued-pretraining, peft.LoraConfig (ensure_weight_tying).

The copies are fp32: AdamW's updates at these learning rates are smaller than what bf16 can hold (core/memory.py). The
layers between them compute as before: what the embedding gives is cast to the base weights' dtype, and what the last
layer gives to fp32.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fasttune.core import pretrained
from fasttune.errors import ModelError
from fasttune.settings import ModelConfig

WEIGHT = ".modules_to_save.default.weight"


def trained_too(get_peft_model: Callable[..., Any]) -> Callable[..., Any]:
    """`get_peft_model`, for which embeddings and head are trained too. Raises ModelError for a model without a head."""

    def made(model: Any, **arguments: Any) -> Any:
        inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
        if outside is None:
            raise ModelError("lora.train_embeddings: this model has no head of its own: set it to false")
        tied, dtype = outside.weight is inside.weight, inside.weight.dtype
        ends = [inside] if tied else [inside, outside]
        names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in ends]
        # Where activations go to the host, Unsloth moves the frozen tensors to a file, which stays mapped.
        with tempfile.TemporaryDirectory() as folder:
            more = {"modules_to_save": names, "ensure_weight_tying": tied, "temporary_location": folder}
            model = get_peft_model(model, **arguments, **more)
        _hold_in_fp32(model, dtype)
        return model

    return made


def add_tokens(model: Any, tokenizer: Any, config: ModelConfig) -> None:
    """model.added_tokens for both. What embeds one, and what predicts it in a head that is not tied, begins as the mean
    of all before it: so none is likelier at first than the others are on average. Raises ModelError.

    Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    pretrained.add_tokens(tokenizer, config)
    ids = tokenizer.convert_tokens_to_ids(config.added_tokens)
    if ids != pretrained.read_tokenizer(config).convert_tokens_to_ids(config.added_tokens):
        fix = "save the tokenizer with a padding token first"
        raise ModelError(f"model.added_tokens: Unsloth gives this model a token of its own, so ids are shifted: {fix}")
    if max(ids) >= len(model.get_input_embeddings().weight):  # some models have rows to spare
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    with torch.no_grad():
        for weight in {id(end.weight): end.weight for end in ends}.values():
            weight[ids] = weight[: min(ids)].mean(0, dtype=torch.float32).to(weight.dtype)


def parameters(model: Any) -> Iterator[torch.nn.Parameter]:
    """Those of embeddings and head that are trained beside an adapter."""
    return (parameter for name, parameter in model.named_parameters() if name.endswith(WEIGHT))


def _hold_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """The trained copies; dtype: of the layers between them."""
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    for end in (inside, outside):
        end.modules_to_save["default"].float()
    if dtype == torch.float32:
        return
    inside.register_forward_hook(lambda _module, _arguments, output: output.to(dtype))
    model.get_base_model().get_decoder().register_forward_hook(_give_fp32)


def _give_fp32(_module: Any, _arguments: Any, output: Any) -> Any:
    """What the head takes; without autocast (Unsloth uses none on a CPU without bf16) nothing else would cast it."""
    output.last_hidden_state = output.last_hidden_state.float()
    return output
