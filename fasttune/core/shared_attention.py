"""Attention on a GPU of packs whose rows share beginnings: Flash Attention for each part of what a token sees.

A segment (data/sharing.py) is causal within itself and sees all of those above it. So there is one variable-length call
in which each segment is alone, and one a level of the tree in which those below see one above, without causality;
outputs are added with the weights that their log-sum-exps give. Backward is the same calls with the whole output and
log-sum-exp: all of the softmax that Flash Attention's backward needs (https://arxiv.org/abs/2307.08691, section 3.1).
Rehearsed on a CPU, proved on the live model before a run.

Shapes: T tokens of a pack, H query heads, G key heads, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Call:
    """What a variable-length call looks at: `queries` and `keys` are places in the pack, None for all; ends as flash
    attention takes them, (segments + 1,) int32."""

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int

    def of(self, tensor: torch.Tensor, keys: bool = False) -> torch.Tensor:
        places = self.keys if keys else self.queries
        return tensor if places is None else tensor.index_select(0, places)


class Pack:
    """A micro-batch as data/sharing.py `flat` lays it out: lengths of its segments, and the parent of each, or -1."""

    def __init__(self, lengths: list[int], parents: list[int], device: Any):
        self.lengths, self.parents, self.device = lengths, parents, device

    @cached_property
    def longest_row(self) -> int:
        ends = list[int]()
        for length, parent in zip(self.lengths, self.parents, strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        return max(ends)

    @cached_property
    def calls(self) -> list[Call]:
        """First the one in which each segment is alone, then one a level of those that others continue."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        last, levels = list(ends), list[int]()
        for parent in self.parents:
            levels.append(levels[parent] + 1 if parent >= 0 else 0)
        for number in reversed(range(len(ends))):
            if (parent := self.parents[number]) >= 0:  # what is below a segment follows it without a gap
                last[parent] = max(last[parent], last[number])
        calls = [self._call(None, None, self.lengths, self.lengths)]
        for level in range(max(levels)):
            above = [n for n, its in enumerate(levels) if its == level and last[n] > ends[n]]
            keys = [torch.arange(ends[n] - self.lengths[n], ends[n]) for n in above]
            queries = [torch.arange(ends[n], last[n]) for n in above]
            calls.append(self._call(torch.cat(queries), torch.cat(keys), list(map(len, queries)), list(map(len, keys))))
        return calls

    def _call(
        self, queries: torch.Tensor | None, keys: torch.Tensor | None, query_lengths: list[int], key_lengths: list[int]
    ) -> Call:
        def ends(lengths: list[int]) -> torch.Tensor:
            return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)

        queries, keys = (None if each is None else each.to(self.device) for each in (queries, keys))
        return Call(queries, keys, ends(query_lengths), ends(key_lengths), max(query_lengths), max(key_lengths))


class SharedAttention(torch.autograd.Function):
    """query (T, H, D), key and value (T, G, D) → (T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, pack: Pack
    ) -> torch.Tensor:
        alone, *above = pack.calls
        out, lse = flash_forward(query, key, value, alone, True, scale)
        for call in above:
            part, part_lse = flash_forward(call.of(query), call.of(key, True), call.of(value, True), call, False, scale)
            whole, whole_lse = call.of(out).float(), lse.index_select(1, call.queries)
            both = torch.logaddexp(whole_lse, part_lse)
            weights = [(each - both).exp().t().unsqueeze(-1) for each in (whole_lse, part_lse)]
            out = out.index_copy(0, call.queries, (weights[0] * whole + weights[1] * part).to(out.dtype))
            lse = lse.index_copy(1, call.queries, both)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        alone, *above = ctx.pack.calls
        dout = dout.contiguous()
        found = flash_backward(dout, query, key, value, out, lse, alone, True, ctx.scale)
        if not above:
            return *found, None, None
        sums = [each.float() for each in found]  # a shared key gets a part from every row
        for call in above:
            queries = [call.of(each) for each in (dout, query, out)]
            keys = [call.of(each, keys=True) for each in (key, value)]
            part_lse = lse.index_select(1, call.queries)
            parts = flash_backward(*queries[:2], *keys, queries[2], part_lse, call, False, ctx.scale)  # type: ignore
            for total, part, places in zip(sums, parts, (call.queries, call.keys, call.keys), strict=True):
                total.index_add_(0, places, part.float())
        return *(each.to(query.dtype) for each in sums), None, None


def flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the log-sum-exp of each query's scores, (H, T) float32."""
    lengths = (call.query_ends, call.key_ends, call.longest_query, call.longest_key)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *lengths, 0.0, causal, return_debug_mask=False, scale=scale
    )
    if lse.shape != (query.shape[1], len(query)):
        raise RuntimeError(f"flash attention gives a log-sum-exp of shape {tuple(lse.shape)}")
    return out, lse


def flash_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    causal: bool,
    scale: float,
) -> list[torch.Tensor]:
    """The gradients of query, key and value, by what is left of the softmax in `out` and `lse`."""
    lengths = (call.query_ends, call.key_ends, call.longest_query, call.longest_key)
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of a dropout that is 0
    found = torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse.contiguous(), *lengths, 0.0, causal, unused, unused[0], scale=scale
    )
    return list(found)


class Now:
    """The pack that a model computes now, told by a hook on its forward: layers deep below are given no parents."""

    def __init__(self) -> None:
        self.pack: Pack | None = None

    def before_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        parents = kwargs.get("segment_parents")
        self.pack = None
        if parents is not None:
            device = kwargs["input_ids"].device
            self.pack = Pack(kwargs["packed_seq_lengths"].tolist(), parents.tolist(), device)
        ours = ("segment_parents", "segment_owners", "row_ends")
        return args, {name: value for name, value in kwargs.items() if name not in ours}

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: tuple[int, int]
    ) -> torch.Tensor:
        """Of the present pack. Raises RuntimeError for a window: where it ends differs from row to row."""
        assert self.pack is not None
        if window != (-1, 0) and window[0] < self.pack.longest_row - 1:
            raise RuntimeError("a beginning that rows share cannot be seen through a sliding window")
        return SharedAttention.apply(query, key, value, scale or query.shape[-1] ** -0.5, self.pack)


def enable(model: Any, take: Callable[[Now], Callable[[], None]]) -> Callable[[], None]:
    """Let a model take packs with shared beginnings; `take` leads its attention here. Returns what undoes it."""
    now = Now()
    hook, undo = model.register_forward_pre_hook(now.before_forward, with_kwargs=True), take(now)

    def undo_all() -> None:
        hook.remove()
        undo()

    return undo_all
