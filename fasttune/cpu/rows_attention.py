"""Causal attention of packed rows on a CPU: each row by itself, behind a prefix that all of them may share.

Block by block of queries, so that nothing above the diagonal is computed; a quarter to a third faster than torch's
kernel for a CPU (docs/LOG.md). Shapes: H query heads in G groups of R, one per key head; T tokens of the pack; D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fasttune.cpu import BLOCK, KEPT

FUTURE = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)


class RowsAttention(torch.autograd.Function):
    """query (1, H, T, D), key and value (1, G, T, D) → (1, T, H, D), for rows laid out as `data.batching.flat` does.

    lengths: of each row, in the order of the pack. With `prefix` > 0 the first is that of a prefix which all others
    continue. As FlashAttention does (https://arxiv.org/abs/2307.08691), the gradient of the scores is P·(dP - Σ dO·O).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        lengths: list[int],
        prefix: int,
    ) -> torch.Tensor:
        heads, groups, (tokens, width) = query.shape[1], key.shape[1], query.shape[2:]
        q = (query[0] * scale).unflatten(0, (groups, -1))  # (G, R, T, D)
        k, v = key[0], value[0]
        out = q.new_empty(tokens, groups, heads // groups, width).permute(1, 2, 0, 3)
        kept = []
        for start, end in _rows(lengths):
            seen_k, seen_v = _seen(k, start, end, prefix), _seen(v, start, end, prefix)
            for at, to, reach in _blocks(start, end, seen_k.shape[1]):
                p = _probabilities(q[:, :, at:to], seen_k[:, :reach])
                out[:, :, at:to] = torch.bmm(p, seen_v[:, :reach]).unflatten(1, (-1, to - at))
                if end - start <= KEPT:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.scale, ctx.lengths, ctx.prefix = scale, lengths, prefix
        return out.permute(2, 0, 1, 3).reshape(1, tokens, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        kept_in_order = iter(kept)
        dout = dout[0].unflatten(1, q.shape[:2]).permute(1, 2, 0, 3)  # (G, R, T, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (dout * out).sum(-1, keepdim=True)
        for start, end in _rows(ctx.lengths):
            seen_k, seen_v = _seen(k, start, end, ctx.prefix), _seen(v, start, end, ctx.prefix)
            row_dk, row_dv = torch.zeros_like(seen_k), torch.zeros_like(seen_v)
            for at, to, reach in _blocks(start, end, seen_k.shape[1]):
                rows_q, do = q[:, :, at:to].flatten(1, 2), dout[:, :, at:to].flatten(1, 2)  # (G, R·block, D)
                p = next(kept_in_order) if end - start <= KEPT else _probabilities(q[:, :, at:to], seen_k[:, :reach])
                ds = torch.bmm(do, seen_v[:, :reach].transpose(1, 2)).sub_(inner[:, :, at:to].flatten(1, 2)).mul_(p)
                dq[:, :, at:to] = torch.bmm(ds, seen_k[:, :reach]).unflatten(1, (-1, to - at))
                row_dk[:, :reach].baddbmm_(ds.transpose(1, 2), rows_q)
                row_dv[:, :reach].baddbmm_(p.transpose(1, 2), do)
            _add_seen(dk, row_dk, start, end)
            _add_seen(dv, row_dv, start, end)
        return dq.mul_(ctx.scale).flatten(0, 1)[None], dk[None], dv[None], None, None, None


def _rows(lengths: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


def _blocks(start: int, end: int, seen: int) -> Iterator[tuple[int, int, int]]:
    """(first query, one past the last, how many of the row's `seen` keys those may see)."""
    for at in range(start, end, BLOCK):
        to = min(at + BLOCK, end)
        yield at, to, seen - (end - to)


def _seen(keys: torch.Tensor, start: int, end: int, prefix: int) -> torch.Tensor:
    """What a row sees: (G, prefix + its own, D); the prefix itself, which starts at 0, sees only itself."""
    own = keys[:, start:end]
    return torch.cat([keys[:, :prefix], own], 1) if prefix and start else own


def _add_seen(total: torch.Tensor, gradient: torch.Tensor, start: int, end: int) -> None:
    """The reverse of `_seen`."""
    before = gradient.shape[1] - (end - start)
    total[:, :before] += gradient[:, :before]
    total[:, start:end] += gradient[:, before:]


def _probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Softmax of q (G, R, block, D) on k (G, keys, D), whose last keys are the queries' own: (G, R·block, keys)."""
    block = q.shape[2]
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2))
    scores.unflatten(1, (-1, block))[..., -block:].masked_fill_(FUTURE[:block, :block], float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
