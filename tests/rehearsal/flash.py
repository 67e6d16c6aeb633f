"""Flash Attention's variable-length calls on a CPU, in place of the GPU's in core/shared_attention.py."""

from itertools import pairwise
from typing import Any

import torch


def forward(q: Any, k: Any, v: Any, call: Any, causal: bool, scale: float) -> tuple[Any, Any]:
    """What aten._flash_attention_forward gives for a variable-length call: output (T, H, D), log-sum-exp (H, T)."""
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=torch.float32)
    for queries, keys in segments(call):
        scores = scores_of(q[queries], k[keys], causal, scale)
        lse[:, queries] = scores.logsumexp(-1).float()
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated(v[keys], q))
    return out, lse


def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, call: Any, causal: bool, scale: float) -> list[Any]:
    """Flash Attention 2's: P from the log-sum-exp that it is given, dS = P·(dP - Σ dO·O)."""
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for queries, keys in segments(call):
        p = (scores_of(q[queries], k[keys], causal, scale) - lse[:, queries].unsqueeze(-1)).exp()
        inner = (dout[queries] * out[queries]).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", dout[queries], repeated(v[keys], q)) - inner) * scale
        dq[queries] = torch.einsum("hqk,khd->qhd", ds, repeated(k[keys], q))
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, q[queries]).unflatten(1, (-1, group)).sum(2)
        dv[keys] = torch.einsum("hqk,qhd->khd", p, dout[queries]).unflatten(1, (-1, group)).sum(2)
    return [dq, dk, dv]


def segments(call: Any) -> list[tuple[slice, slice]]:
    queries, keys = ([slice(*ends) for ends in pairwise(each.tolist())] for each in (call.query_ends, call.key_ends))
    assert call.longest_query == max(each.stop - each.start for each in queries)
    assert call.longest_key == max(each.stop - each.start for each in keys)
    return list(zip(queries, keys, strict=True))


def repeated(keys: Any, like: Any) -> Any:
    return keys.repeat_interleave(like.shape[1] // keys.shape[1], 1)


def scores_of(q: Any, k: Any, causal: bool, scale: float) -> Any:
    scores = torch.einsum("qhd,khd->hqk", q, repeated(k, q)) * scale
    return scores.masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), float("-inf")) if causal else scores
