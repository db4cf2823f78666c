"""Moving rows between tokens and experts in Triton, in a fixed order and without atomics.

Rows may lie in wider ones: every tensor of rows comes with the distance from one to the next. Lengths and
distances are counted in eights of elements: told so, the compiler moves 16 bytes at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A program's tile: 4 rows of 512 columns are 4 KB of bfloat16, 16 bytes for each of 256 threads; six tiles
# cover a row of gpt-oss (2880), the last at five eighths.
ROWS, COLUMNS, WARPS = 4, 512, 8


@triton.jit
def gather_kernel(
    x, index, out, rows, eights, x_eights, out_eights,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out[i, :8 * eights] = x[index[i], :8 * eights]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(index + row, mask=row < rows, other=0)
    there = (row < rows)[:, None] & (column < eights * 8)[None, :]
    value = tl.load(x + source[:, None] * (x_eights * 8) + column[None, :], mask=there)
    tl.store(out + row[:, None] * (out_eights * 8) + column[None, :], value, mask=there)


@triton.jit
def combine_kernel(
    x, place, scores, out, tokens, eights, x_eights,
    TOP: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out[t] = sum over j of scores[t, j] * x[place[t, j]]`, added in float32 in the order of j."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (token < tokens)[:, None] & (column < eights * 8)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in tl.static_range(TOP):
        source = tl.load(place + token * TOP + j, mask=token < tokens, other=0)
        value = tl.load(x + source[:, None] * (x_eights * 8) + column[None, :], mask=there).to(tl.float32)
        if WEIGHTED:
            score = tl.load(scores + token * TOP + j, mask=token < tokens, other=0).to(tl.float32)
            value = value * score[:, None]
        total += value
    total = total.to(out.dtype.element_ty)
    tl.store(out + token[:, None] * (eights * 8) + column[None, :], total, mask=there)


@triton.jit
def row_dots_kernel(
    left, right, out, rows, eights, left_eights, right_eights,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`out[i] = sum over c of left[i, c] * right[i, c]`, in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, eights * 8, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = (row < rows)[:, None] & (column < eights * 8)[None, :]
        a = tl.load(left + row[:, None] * (left_eights * 8) + column[None, :], mask=there, other=0)
        b = tl.load(right + row[:, None] * (right_eights * 8) + column[None, :], mask=there, other=0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out + row, tl.sum(total, 1), mask=row < rows)


def gather(x: Tensor, index: Tensor, out: Tensor) -> None:
    """`out [n, :M]` takes the rows of `x [T, M]` that `index [n]` (int64) names."""
    rows, columns = index.numel(), x.shape[1]
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    gather_kernel[grid](
        x, index, out, rows, columns // 8, x.stride(0) // 8, out.stride(0) // 8,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def combine(x: Tensor, place: Tensor, top: int, scores: Tensor | None, out: Tensor) -> None:
    """`out [T, M]`: each token's `top` rows of `x [N, M]`, at `place [N]` (int64), by `scores [T, k]`."""
    tokens, columns = out.shape
    grid = triton.cdiv(tokens, ROWS), triton.cdiv(columns, COLUMNS)
    combine_kernel[grid](
        x, place, place if scores is None else scores, out, tokens, columns // 8, x.stride(0) // 8,
        TOP=top, WEIGHTED=scores is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def row_dots(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out [n]` float32: each row of `left [n, M]` with that of `right [n, M]`."""
    rows, columns = left.shape
    row_dots_kernel[(triton.cdiv(rows, ROWS),)](
        left, right, out, rows, columns // 8, left.stride(0) // 8, right.stride(0) // 8,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
