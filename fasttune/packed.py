"""Rows packed into one sequence that never see each other, and the proof of it for any model.

On a GPU Unsloth's own kernels take the row lengths (`packed_seq_lengths`). On the CPU, where Unsloth runs plain
transformers, `RowsAttention` does; there a beginning that all rows of a pack share is computed once.
"""

from typing import Any

import numpy as np

from fasttune import model as models  # first: it imports unsloth

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fasttune.cpu.rows_attention import RowsAttention
from fasttune.data.batches import flat

NAME = "fasttune_rows"
PROBE_PREFIX, PROBE_LENGTHS = 20, [25, 29, 23]  # of three rows that begin alike
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative; a row that sees another is off by its own size


def rows_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_seq_lengths: torch.Tensor | None = None,
    shared_prefix: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row of a pack by itself. query (1, H, T, D); key, value (1, KV, T, D) → (1, T, H, D).

    Without `packed_seq_lengths` (generation, padded rows) it is transformers' own SDPA.
    """
    if packed_seq_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix = 0 if shared_prefix is None else int(shared_prefix)
    return RowsAttention.apply(query, key, value, scale, packed_seq_lengths.tolist(), prefix), None


def rows_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask where nothing is padded or cached: SDPA's own causal one does. Else what transformers makes for SDPA."""
    if attention_mask is None and kwargs.get("q_length", -1) == kwargs.get("kv_length", -2):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def shares_prefix() -> bool:
    """Whether `enable` makes a model take packs whose rows share a prefix: Unsloth's kernels for a GPU cannot."""
    return not torch.cuda.is_available()


def enable(model: Any, max_length: int) -> str | None:
    """Make a loaded model take packed rows; None, or the reason why it cannot be packed exactly (then it is unchanged).

    Proved on the live model: logits of small packs against those of their rows alone, in the model's own attention.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True)
    reach = window if windowed else getattr(config, "attention_chunk_size", None)
    if reach is not None and reach < max_length:
        return f"its attention looks back {reach:,} tokens only, less than model.max_length={max_length:,}"
    if getattr(config, "attention_dropout", 0.0):
        return f"its attention drops out (attention_dropout={config.attention_dropout:g})"
    before = config._attn_implementation
    alone = [_logits(model, {"input_ids": ids[None]}) for ids, _ in _probe_rows(model)]
    if shares_prefix():
        AttentionInterface.register(NAME, rows_attention)
        AttentionMaskInterface.register(NAME, rows_mask)
        config._attn_implementation = NAME
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 5e-2)
    undo = None if shares_prefix() else models.take_varlen_kernel()
    error = packing_error(model, alone)
    if error > tolerance and undo is not None:
        undo()
        error = packing_error(model, alone)
    if error <= tolerance:
        return None
    config._attn_implementation = before
    return f"its rows see each other in a pack (logits differ by {error:.1%})"


def packing_error(model: Any, alone: list[torch.Tensor]) -> float:
    """Largest relative difference of the logits of packed rows from `alone`, those of the same rows by themselves."""
    rows = _probe_rows(model)
    try:
        errors = [_difference(_logits(model, flat(rows)).split(PROBE_LENGTHS, 1), alone)]
        if shares_prefix():
            pack = flat(rows, share_prefix=True)
            assert pack["shared_prefix"] == PROBE_PREFIX
            _, *own = _logits(model, pack).split(pack["packed_seq_lengths"].tolist(), 1)
            errors.append(_difference(own, [logits[:, PROBE_PREFIX:] for logits in alone]))
    except (TypeError, ValueError, RuntimeError):  # a forward that does not know row lengths at all
        return float("inf")
    return max(errors)


def _probe_rows(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, learned) of random rows that begin alike; their last two tokens are learned."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = np.random.default_rng(0).integers(vocabulary, size=(len(PROBE_LENGTHS), max(PROBE_LENGTHS)))
    draw[:, :PROBE_PREFIX] = draw[0, :PROBE_PREFIX]
    draw[:, PROBE_PREFIX] = range(len(PROBE_LENGTHS))  # and differ after it
    return [(ids[:length], np.arange(length) >= length - 2) for ids, length in zip(draw, PROBE_LENGTHS, strict=True)]


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(1, T, V) of a micro-batch without its labels."""
    given = {name: torch.from_numpy(array).to(model.device) for name, array in batch.items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        return model(**given, use_cache=False).logits
    finally:
        model.train(was_training)


def _difference(packed: Any, alone: Any) -> float:
    largest = max(float(logits.abs().max()) for logits in alone)
    return max(float((a - b).abs().max()) for a, b in zip(packed, alone, strict=True)) / largest
