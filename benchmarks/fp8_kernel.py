"""Triton's part of fp8.py."""

import triton
import triton.language as tl


@triton.jit
def quantize_rows(x, out, scale, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program: out = x / scale in e4m3, scale = the row's largest size / 448."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(values)), 1e-12) / 448.0
    tl.store(out + row * columns + at, (values / step).to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, step)
