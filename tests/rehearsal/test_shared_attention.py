"""The mathematics of core/shared_attention.py on a CPU: attention with the mask of the tree, and its gradients."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import flash

Tree = tuple[list[int], list[int]]  # lengths of the segments, and their parents


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

    monkeypatch.setattr(shared, "flash_forward", flash.forward)
    monkeypatch.setattr(shared, "flash_backward", flash.backward)
    tree = random_tree(seed)
    generator, tokens = torch.Generator().manual_seed(seed), sum(tree[0])
    q, k, v, dout = (torch.randn(tokens, h, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2, 4))

    def gradients(attention: Any) -> list[Any]:
        leaves = [each.clone().requires_grad_() for each in (q, k, v)]
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    def dense(q: Any, k: Any, v: Any) -> Any:
        scores = torch.einsum("qhd,khd->hqk", q, flash.repeated(k, q)) / 4
        return torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(~visible(tree), float("-inf")).softmax(-1), flash.repeated(v, q)
        )

    def of_a_cpu(q: Any, k: Any, v: Any) -> Any:
        heads = [each.float().transpose(0, 1)[None] for each in (q, k, v)]
        return RowsAttention.apply(*heads, 0.25, Layout(*tree))[0].double()

    expected = gradients(dense)
    pack = shared.Pack(*tree, "cpu")
    for mine in (gradients(lambda *qkv: shared.SharedAttention.apply(*qkv, 0.25, pack)), gradients(of_a_cpu)):
        for found, wanted in zip(mine, expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
