"""Rows packed into one sequence that never see each other, and the proof of it for any model.

On a GPU Unsloth's own kernels take the row lengths (`packed_seq_lengths`), and core/shared_attention.py beginnings that
rows share. On the CPU, where Unsloth runs plain transformers, `RowsAttention` does both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fasttune.core import model as models  # first: it imports unsloth

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fasttune.cpu.rows_attention import Layout, RowsAttention
from fasttune.data import sharing
from fasttune.data.sharing import ON_HOST, Encoded, MicroBatch, flat, paths
from fasttune.errors import first_line

NAME = "fasttune_rows"
PROBE_LENGTHS, PROBE_ALIKE = [30, 33, 21, 17], [(3, 14), (2, 24)]  # tokens of rows; (rows, tokens they begin with)
PROBE_WINDOW, PROBE_LEAST = 12, 8  # tokens
# Relative, of all logits of a row. A layout may add so many times what another one adds by rounding alone, or so much.
ROUNDINGS = 4
LEAST_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def rows_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_seq_lengths: torch.Tensor | None = None,
    segment_parents: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row of a pack by itself. query (1, H, T, D); key, value (1, KV, T, D) → (1, T, H, D).

    Without `packed_seq_lengths` (generation, padded rows) it is transformers' own SDPA.
    """
    if packed_seq_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rope has made them fp32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = packed_seq_lengths.tolist()
    parents = [-1] * len(lengths) if segment_parents is None else segment_parents.tolist()
    return RowsAttention.apply(query, key, value, scale, Layout(lengths, parents, sliding_window)), None


def rows_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask where nothing is padded, cached or out of a window: SDPA's own causal one does. Else what transformers
    makes for SDPA."""
    tokens = kwargs.get("kv_length", -2)
    if attention_mask is None and kwargs.get("q_length", -1) == tokens and (local_size or tokens) >= tokens:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


def enable(model: Any, max_length: int) -> str | None:
    """Make a loaded model take packed rows; None, or the reason why it cannot be packed exactly (then it is unchanged).

    Proved on the live model, with the kernels that will train it. Raises what the device raises, out of memory too.
    """
    config = model.config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < max_length:
        return f"its attention sees chunks of {chunk:,} tokens, fewer than model.max_length={max_length:,}"
    if getattr(config, "attention_dropout", 0.0):
        return f"its attention drops out (attention_dropout={config.attention_dropout:g})"
    if not torch.cuda.is_available():
        if cap := getattr(config, models.SOFTCAP, None):
            return f"its attention caps scores ({models.SOFTCAP}={cap:g}), which packs on a CPU do not"
        AttentionInterface.register(NAME, rows_attention)
        AttentionMaskInterface.register(NAME, rows_mask)
        before = models.set_attention(model, NAME)
        reason = inexact(model, max_length)
        if reason is not None:
            models.set_attention(model, before)
        return reason
    models.enable_packed_kernels(model)
    undo = models.take_varlen_kernel()
    reason = inexact(model, max_length)
    if reason is not None and undo is not None:  # then as Unsloth would do it alone
        undo()
        reason = inexact(model, max_length)
    return reason


def enable_shared(model: Any, max_length: int) -> str | None:
    """As `enable`, of a model that takes packed rows: packs in which beginnings that rows share are computed once."""
    if not torch.cuda.is_available():
        return inexact(model, max_length, shared=True)
    from fasttune.core import shared_attention

    undo = shared_attention.enable(model, models.take_shared_attention)
    reason = inexact(model, max_length, shared=True)
    if reason is not None:
        undo()
    return reason


def inexact(model: Any, max_length: int, shared: bool = False) -> str | None:
    """None where packs are exact on the live model, else what is wrong. It is looked at twice:

    no gradient of a row's logits reaches another row's embeddings, in training mode: zero to the bit, in every dtype;
    a row's logits are those of the row alone, up to a small multiple of what the layout alone changes in this dtype.
    """
    rows = _probe_rows(model)
    pack = flat(rows, sharing.tree(rows, PROBE_LEAST) if shared else None)
    try:
        with _short_windows(model, max_length):
            with _mode(model, training=False), torch.no_grad():
                alone = [_logits(model, {"input_ids": ids[None]})[0] for ids, _ in rows]
                packed = _logits(model, pack)[0]
                rounding = max(map(_difference, _logits(model, _rectangle(rows)), alone))
            tolerance = max(ROUNDINGS * rounding, LEAST_TOLERANCE.get(models.computes_in(model), 5e-2))
            places = [_places(pack, path) for path in paths(pack)]
            error = max(_difference(packed[place], row) for place, row in zip(places, alone, strict=True))
            if not error <= tolerance:  # NaN too
                return (
                    f"its rows differ from what they are alone (logits by {error:.1%}, in rectangles by {rounding:.1%})"
                )
            if any(_leaks(model, pack, place) for place in places):
                return "its rows see each other in a pack"
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "allocate memory" in str(error):
            raise
        return f"it does not take row lengths ({first_line(error)})"
    return None


def _places(pack: MicroBatch, path: list[int]) -> torch.Tensor:
    """Where the tokens of a row lie that goes through these segments."""
    ends = np.cumsum(pack["packed_seq_lengths"])
    starts = ends - pack["packed_seq_lengths"]
    return torch.from_numpy(np.concatenate([np.arange(starts[segment], ends[segment]) for segment in path]))


def _leaks(model: Any, pack: MicroBatch, row: torch.Tensor) -> bool:
    """Whether the logits of a row depend on an embedding of another one."""
    leaves: list[torch.Tensor] = []

    def leaf(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # Unsloth scales what it gets in place

    hook = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with _mode(model, training=True):  # backward too, which may recompute
            logits = _logits(model, pack)[0, row].float()
            (logits * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).sum().backward()
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    (gradient,) = leaves[-1].grad
    seen = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
    seen[row] = True
    return bool(gradient[~seen].any()) or not bool(gradient[seen].any())


def _rectangle(rows: list[Encoded]) -> MicroBatch:
    """The rows below each other, each filled up behind its end, where causal attention does not look. No mask."""
    longest = sum(len(ids) for ids, _ in rows)
    return {"input_ids": np.stack([np.resize(ids, longest) for ids, _ in rows])}


def _probe_rows(model: Any) -> list[Encoded]:
    """(ids, supervised) of random rows, of which the first three begin alike, and the first two go on alike; the last
    two tokens of each are supervised."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = np.random.default_rng(0).integers(vocabulary, size=(len(PROBE_LENGTHS), max(PROBE_LENGTHS)))
    draw[:, 0] = range(len(PROBE_LENGTHS))
    for alike, tokens in PROBE_ALIKE:
        draw[:alike, :tokens] = draw[0, :tokens]
        draw[:alike, tokens] = range(alike)  # and differ after it
    return [(ids[:length], np.arange(length) >= length - 2) for ids, length in zip(draw, PROBE_LENGTHS, strict=True)]


@contextmanager
def _short_windows(model: Any, max_length: int) -> Iterator[None]:
    """Sliding windows that end within rows of a run end within those of the proof."""
    owners = [model.config.get_text_config(), *models.decoder_layers(model)]
    owners += [layer.self_attn for layer in owners[1:] if hasattr(layer, "self_attn")]
    windows = [(owner, getattr(owner, "sliding_window", None)) for owner in owners]
    before = [(owner, window) for owner, window in windows if window is not None and window < max_length]
    try:
        for owner, _ in before:
            owner.sliding_window = PROBE_WINDOW
        yield
    finally:
        for owner, window in before:
            owner.sliding_window = window


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    """A model in training or in evaluation mode, and back."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """(B, T, V) of a micro-batch without its labels, under autocast as the trainer runs a bf16 model."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items() if name != "labels"}
    tensors = {name: each if name in ON_HOST else each.to(model.device) for name, each in tensors.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=models.computes_in(model) == torch.bfloat16):
        return model(**tensors, use_cache=False).logits


def _difference(packed: torch.Tensor, alone: torch.Tensor) -> float:
    """‖packed − alone‖ / ‖alone‖ of logits (T, V) at the row's tokens. Single logits say less: in bf16 those of SmolLM2
    move by 15 % of the largest one between two layouts of the same row.
    """
    packed, alone = packed[: len(alone)].float(), alone.float()
    return float(torch.linalg.vector_norm(packed - alone) / torch.linalg.vector_norm(alone))
