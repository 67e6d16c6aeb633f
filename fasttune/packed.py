"""Rows packed into one sequence that never see each other: the attention for the CPU, and the proof for any model.

On a GPU Unsloth's own kernels take the row lengths (`packed_seq_lengths`). On the CPU, where Unsloth runs plain
transformers, attention is run row by row: exact, and cheaper than a masked square of the whole pack.
"""

from typing import Any

import fasttune.model  # noqa: F401  first: it imports unsloth

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "fasttune_rows"
PROBE_LENGTHS = [5, 9, 3]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative; a row that sees another is off by its own size


def rows_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_seq_lengths: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row of a pack by itself. query (1, H, T, D); key, value (1, KV, T, D) → (1, T, H, D).

    Without `packed_seq_lengths` (generation, padded rows) it is transformers' own SDPA.
    """
    if packed_seq_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = packed_seq_lengths.tolist()
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in rows], dim=1), None


def rows_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask where nothing is padded or cached: SDPA's own causal one does. Else what transformers makes for SDPA."""
    if attention_mask is None and kwargs.get("q_length", -1) == kwargs.get("kv_length", -2):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def enable(model: Any, max_length: int) -> str | None:
    """Make a loaded model take packed rows; None, or the reason why it cannot be packed exactly (then it is unchanged).

    Proved on the live model: hidden states of a small pack against those of its rows alone.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True)
    reach = window if windowed else getattr(config, "attention_chunk_size", None)
    if reach is not None and reach < max_length:
        return f"its attention looks back {reach:,} tokens only, less than model.max_length={max_length:,}"
    before = config._attn_implementation
    if not torch.cuda.is_available():
        AttentionInterface.register(NAME, rows_attention)
        AttentionMaskInterface.register(NAME, rows_mask)
        config._attn_implementation = NAME
    error = packing_error(model)
    if error <= TOLERANCE.get(next(model.parameters()).dtype, 5e-2):
        return None
    config._attn_implementation = before
    return f"its rows see each other in a pack (hidden states differ by {error:.1%})"


@torch.no_grad()
def packing_error(model: Any) -> float:
    """Largest relative difference of the logits of packed rows from those of the same rows alone."""
    total = sum(PROBE_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    device, vocabulary = model.device, model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, total), generator=generator).to(device)  # (1, T)
    positions = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])[None].to(device)
    lengths = torch.tensor(PROBE_LENGTHS, dtype=torch.int32)
    was_training = model.training
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=positions, packed_seq_lengths=lengths, use_cache=False).logits
        alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in ids.split(PROBE_LENGTHS, 1)], 1)
    except (TypeError, ValueError, RuntimeError):  # a forward that does not know row lengths at all
        return float("inf")
    finally:
        model.train(was_training)
    return float((packed - alone).abs().max() / alone.abs().max())
