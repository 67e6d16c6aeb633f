"""Causal attention of packed rows on a CPU: each row by itself, behind beginnings that rows may share.

Block by block of queries, so that nothing above the diagonal is computed; a quarter to a third faster than torch's
kernel for a CPU (docs/LOG.md). Shapes: H query heads in G groups of R, one per key head; T tokens of the pack; D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fasttune.cpu import BLOCK, KEPT

FUTURE = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)


@dataclass(frozen=True)
class Layout:
    """How a pack lies, as data/sharing.py `flat` says it.

    lengths: of each segment, in the order of the pack. parents: the segment that each continues, or -1.
    window: how many tokens back a token sees, itself counted; None: all of its row.
    """

    lengths: list[int]
    parents: list[int]
    window: int | None = None

    def segments(self) -> Iterator[tuple[int, int, list[slice]]]:
        """(start, end, where the tokens before it in its rows lie), of each segment."""
        where: list[slice] = []
        paths: list[list[slice]] = []
        start = 0
        for length, parent in zip(self.lengths, self.parents, strict=True):
            before = [*paths[parent], where[parent]] if parent >= 0 else []
            where.append(slice(start, start + length))
            paths.append(before)
            yield start, start + length, before
            start += length

    def blocks(self, start: int, end: int, seen: int) -> Iterator[tuple[int, int, int, int]]:
        """(first query, one past the last, and from where to where of the row's `seen` keys they look)."""
        for at in range(start, end, BLOCK):
            to = min(at + BLOCK, end)
            reach = seen - (end - to)
            yield at, to, 0 if self.window is None else max(0, reach - (to - at) - self.window + 1), reach


class RowsAttention(torch.autograd.Function):
    """query (1, H, T, D), key and value (1, G, T, D) → (1, T, H, D), for rows that lie as `layout` says.

    As FlashAttention does (https://arxiv.org/abs/2307.08691), the gradient of the scores is P·(dP - Σ dO·O).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layout: Layout
    ) -> torch.Tensor:
        heads, groups, (tokens, width) = query.shape[1], key.shape[1], query.shape[2:]
        q = (query[0] * scale).unflatten(0, (groups, -1))  # (G, R, T, D)
        k, v = key[0], value[0]
        out = q.new_empty(tokens, groups, heads // groups, width).permute(1, 2, 0, 3)
        kept = []
        for start, end, before in layout.segments():
            seen_k, seen_v = _seen(k, start, end, before), _seen(v, start, end, before)
            for at, to, since, reach in layout.blocks(start, end, seen_k.shape[1]):
                p = _probabilities(q[:, :, at:to], seen_k[:, since:reach], layout.window)
                out[:, :, at:to] = torch.bmm(p, seen_v[:, since:reach]).unflatten(1, (-1, to - at))
                if seen_k.shape[1] <= KEPT:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.scale, ctx.layout = scale, layout
        return out.permute(2, 0, 1, 3).reshape(1, tokens, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        kept_in_order, layout = iter(kept), ctx.layout
        dout = dout[0].unflatten(1, q.shape[:2]).permute(1, 2, 0, 3)  # (G, R, T, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (dout * out).sum(-1, keepdim=True)
        for start, end, before in layout.segments():
            seen_k, seen_v = _seen(k, start, end, before), _seen(v, start, end, before)
            row_dk, row_dv = torch.zeros_like(seen_k), torch.zeros_like(seen_v)
            keep = seen_k.shape[1] <= KEPT
            for at, to, since, reach in layout.blocks(start, end, seen_k.shape[1]):
                rows_q, do = q[:, :, at:to].flatten(1, 2), dout[:, :, at:to].flatten(1, 2)  # (G, R·block, D)
                keys, values = seen_k[:, since:reach], seen_v[:, since:reach]
                p = next(kept_in_order) if keep else _probabilities(q[:, :, at:to], keys, layout.window)
                ds = torch.bmm(do, values.transpose(1, 2)).sub_(inner[:, :, at:to].flatten(1, 2)).mul_(p)
                dq[:, :, at:to] = torch.bmm(ds, keys).unflatten(1, (-1, to - at))
                row_dk[:, since:reach].baddbmm_(ds.transpose(1, 2), rows_q)
                row_dv[:, since:reach].baddbmm_(p.transpose(1, 2), do)
            _add_seen(dk, row_dk, start, end, before)
            _add_seen(dv, row_dv, start, end, before)
        return dq.mul_(ctx.scale).flatten(0, 1)[None], dk[None], dv[None], None, None


def _seen(keys: torch.Tensor, start: int, end: int, before: list[slice]) -> torch.Tensor:
    """All that a segment's last token sees: (G, the tokens before it in its rows + its own, D)."""
    own = keys[:, start:end]
    return torch.cat([*(keys[:, place] for place in before), own], 1) if before else own


def _add_seen(total: torch.Tensor, gradient: torch.Tensor, start: int, end: int, before: list[slice]) -> None:
    """The reverse of `_seen`."""
    places = [*before, slice(start, end)]
    for place, part in zip(places, gradient.split([place.stop - place.start for place in places], 1), strict=True):
        total[:, place] += part


def _probabilities(q: torch.Tensor, k: torch.Tensor, window: int | None) -> torch.Tensor:
    """Softmax of q (G, R, block, D) on k (G, keys, D), whose last keys are the queries' own: (G, R·block, keys)."""
    block, keys = q.shape[2], k.shape[1]
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2))
    by_query = scores.unflatten(1, (-1, block))
    by_query[..., -block:].masked_fill_(FUTURE[:block, :block], float("-inf"))
    if window is not None and keys > window:
        query = torch.arange(keys - block, keys)[:, None]  # by their place among the keys
        by_query.masked_fill_(query - torch.arange(keys) >= window, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
