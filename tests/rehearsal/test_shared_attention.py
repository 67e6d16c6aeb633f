"""The mathematics of core/shared_attention.py on a CPU, with a Flash Attention of a few lines in place of the GPU's."""

import random
from typing import Any

import pytest

Tree = tuple[list[int], list[int]]  # lengths of the segments, and their parents


def reference_forward(q: Any, k: Any, v: Any, call: Any, causal: bool, scale: float) -> tuple[Any, Any]:
    """What aten._flash_attention_forward gives for a variable-length call: output (T, H, D), log-sum-exp (H, T)."""
    import torch

    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=torch.float32)
    for queries, keys in segments(call):
        scores = scores_of(q[queries], k[keys], causal, scale)
        lse[:, queries] = scores.logsumexp(-1).float()
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated(v[keys], q))
    return out, lse


def reference_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, call: Any, causal: bool, scale: float
) -> list[Any]:
    """Flash Attention 2's: P from the log-sum-exp that it is given, dS = P·(dP - Σ dO·O)."""
    import torch

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
    q, k = call.query_ends.tolist(), call.key_ends.tolist()
    assert call.longest_query == max(b - a for a, b in zip(q, q[1:], strict=False))
    assert call.longest_key == max(b - a for a, b in zip(k, k[1:], strict=False))
    return [(slice(*at), slice(*to)) for at, to in zip(zip(q, q[1:], strict=False), zip(k, k[1:], strict=False))]


def repeated(keys: Any, like: Any) -> Any:
    return keys.repeat_interleave(like.shape[1] // keys.shape[1], 1)


def scores_of(q: Any, k: Any, causal: bool, scale: float) -> Any:
    import torch

    scores = torch.einsum("qhd,khd->hqk", q, repeated(k, q)) * scale
    return scores.masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), float("-inf")) if causal else scores


def random_tree(seed: int) -> Tree:
    """Segments in the order in which data/batching.py lays them out: what is below one follows it."""
    rng, lengths, parents = random.Random(seed), list[int](), list[int]()

    def add(parent: int, depth: int) -> None:
        lengths.append(rng.randint(1, 9))
        parents.append(parent)
        number = len(lengths) - 1
        for _ in range(rng.choice([0, 0, 2, 3]) if depth < 3 else 0):
            add(number, depth + 1)

    for _ in range(rng.randint(1, 3)):
        add(-1, 0)
    return lengths, parents


def visible(tree: Tree) -> Any:
    """(T, T): whether a token sees another."""
    import torch

    lengths, parents = tree
    ends = torch.tensor(lengths).cumsum(0).tolist()
    seen = torch.zeros(ends[-1], ends[-1], dtype=torch.bool)
    for number, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        rows = slice(end - length, end)
        seen[rows, rows] = torch.ones(length, length).tril().bool()
        above = parents[number]
        while above >= 0:
            seen[rows, ends[above] - lengths[above] : ends[above]] = True
            above = parents[above]
    return seen


@pytest.mark.parametrize("seed", range(12))
def test_it_is_attention_with_the_mask_of_the_tree(unsloth: None, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    import torch

    from fasttune.core import shared_attention as shared
    from fasttune.cpu.rows_attention import Layout, RowsAttention

    monkeypatch.setattr(shared, "flash_forward", reference_forward)
    monkeypatch.setattr(shared, "flash_backward", reference_backward)
    tree = random_tree(seed)
    generator, tokens = torch.Generator().manual_seed(seed), sum(tree[0])
    q, k, v, dout = (torch.randn(tokens, h, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2, 4))

    def gradients(attention: Any) -> list[Any]:
        leaves = [each.clone().requires_grad_() for each in (q, k, v)]
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    def dense(q: Any, k: Any, v: Any) -> Any:
        scores = torch.einsum("qhd,khd->hqk", q, repeated(k, q)) / 4
        return torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(~visible(tree), float("-inf")).softmax(-1), repeated(v, q)
        )

    def of_a_cpu(q: Any, k: Any, v: Any) -> Any:
        heads = [each.float().transpose(0, 1)[None] for each in (q, k, v)]
        return RowsAttention.apply(*heads, 0.25, Layout(*tree))[0].double()

    expected = gradients(dense)
    pack = shared.Pack(*tree, "cpu")
    for mine in (gradients(lambda *qkv: shared.SharedAttention.apply(*qkv, 0.25, pack)), gradients(of_a_cpu)):
        for found, wanted in zip(mine, expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
