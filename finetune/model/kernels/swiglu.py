"""gpt-oss's clamped SwiGLU and its gradient in Triton; gate and up lie interleaved, as the release has them.

    gate = min(y[0::2], limit)    up = clamp(y[1::2], -limit, limit)
    h = (up + 1) * gate * sigmoid(alpha * gate)

(openai/gpt-oss, `torch/model.py`). All arithmetic is float32; every element is read and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A program's tile in elements of the hidden row: twice as many of y, so 8 KB of bfloat16.
ROWS, COLUMNS, WARPS = 4, 512, 8


@triton.jit
def _gate_and_up(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    gate, up = tl.split(tl.reshape(pairs.to(tl.float32), (ROWS, COLUMNS, 2)))
    return gate, up


@triton.jit
def forward_kernel(
    y, hidden, rows, eights, hidden_eights, alpha, limit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`y [rows, 16 * eights]`, contiguous, into `hidden [rows, 8 * hidden_eights]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = 2 * tl.program_id(1) * COLUMNS + tl.arange(0, 2 * COLUMNS)
    there = (row < rows)[:, None] & (pair < eights * 16)[None, :]
    pairs = tl.load(y + row[:, None] * (eights * 16) + pair[None, :], mask=there, other=0)
    gate, up = _gate_and_up(pairs, ROWS, COLUMNS)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = (up + 1) * gate * tl.sigmoid(alpha * gate)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < eights * 8)[None, :]
    place = hidden + row[:, None] * (hidden_eights * 8) + column[None, :]
    tl.store(place, value.to(hidden.dtype.element_ty), mask=there)


@triton.jit
def backward_kernel(
    y, d_hidden, further, score, d_y, rows, eights, d_hidden_eights, alpha, limit,
    FURTHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`d_y`, which may be `y` itself, from the hidden gradient `score * d_hidden + further`.

    The gradient is zero where a clamp holds.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < eights * 8)[None, :]
    d = tl.load(d_hidden + row[:, None] * (d_hidden_eights * 8) + column[None, :], mask=there, other=0)
    d = d.to(tl.float32) * tl.load(score + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    if FURTHER:
        share = tl.load(further + row[:, None] * (eights * 8) + column[None, :], mask=there, other=0)
        d += share.to(tl.float32)

    pair = 2 * tl.program_id(1) * COLUMNS + tl.arange(0, 2 * COLUMNS)
    there = (row < rows)[:, None] & (pair < eights * 16)[None, :]
    offset = row[:, None] * (eights * 16) + pair[None, :]
    raw_gate, raw_up = _gate_and_up(tl.load(y + offset, mask=there, other=0), ROWS, COLUMNS)
    gate = tl.minimum(raw_gate, limit)
    up = tl.minimum(tl.maximum(raw_up, -limit), limit)
    sigmoid = tl.sigmoid(alpha * gate)
    d_gate = d * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
    d_up = d * gate * sigmoid
    d_gate = tl.where(raw_gate <= limit, d_gate, 0.0)
    d_up = tl.where(tl.abs(raw_up) <= limit, d_up, 0.0)
    pairs = tl.reshape(tl.join(d_gate, d_up), (ROWS, 2 * COLUMNS))
    tl.store(d_y + offset, pairs.to(d_y.dtype.element_ty), mask=there)


def swiglu(y: Tensor, hidden: Tensor, alpha: float, limit: float) -> None:
    """`y [n, 2I]` into `hidden [n, I]`, whose rows may lie in wider ones."""
    rows, columns = hidden.shape
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    forward_kernel[grid](
        y, hidden, rows, columns // 8, hidden.stride(0) // 8, alpha, limit,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def swiglu_gradient(
    y: Tensor, d_hidden: Tensor, further: Tensor | None, score: Tensor, alpha: float, limit: float
) -> Tensor:
    """The gradient of `y [n, 2I]`, written over it, from `score [n] * d_hidden [n, I] + further [n, I]`."""
    rows, columns = d_hidden.shape
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    backward_kernel[grid](
        y, d_hidden, d_hidden if further is None else further, score, y,
        rows, columns // 8, d_hidden.stride(0) // 8, alpha, limit,
        FURTHER=further is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return y
