"""Rounding to MXFP4 so that outputs stay, not weights: error feedback, then coordinate descent on the codes.

A linear map's rows are rounded each for itself. Of a row w that is wanted and a row q of MXFP4 values, with
inputs x that the map will meet, the error is

    (q - w) H (q - w)'     H = mean of x x' over the inputs, plus damping

First w is rounded column by column, each column's error passed on to the columns that follow, where it is
undone as well as they can (Frantar et al. 2022, "GPTQ", algorithm 1). Then, block by block of 32 columns,
codes are chosen anew given all others until little changes. In both, every block tries several scales and
keeps the one whose error is smallest.

Columns come before rows in memory, `[G, I, O]`: one step treats one column of all rows. Letters in shapes:
G maps at once, O rows (outputs), I columns (inputs), C scales that are tried.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.model.layout import BLOCK
from finetune.model.mxfp4 import LARGEST_EXPONENT, SCALE_BIAS

LARGEST_VALUE = 6.0
EXPONENT_BITS = 0x7F800000  # of a float32
CODE_BITS = (127 << 1) - 2  # exponent and first bit of the mantissa of 1.0, whose code is 2
# Smaller blocks than these are zero to any computation in float32 that uses them.
SMALLEST_EXPONENT = -100
# Columns whose errors are passed on to all later ones at once, for the sake of the product's speed.
PASSED_ON_AT_ONCE = 8 * BLOCK
# Triangles up to this size are inverted as they are, larger ones by halves: most of it is then products.
SMALL_TRIANGLE = 256
# A sweep over all blocks that improves the error by less than this share is the last.
ENOUGH = 1e-3


def requantise(wanted: Tensor, moments: Tensor, started: Tensor, *, sweeps: int) -> Tensor:
    """MXFP4 values for `wanted [G, O, I]` that keep the outputs; all float32.

    `moments [G, I, I]` are the inputs' second moments, damped so that they are positive definite. `started
    [G, O, I]`, MXFP4 values, is another start: rows that it serves better than error feedback begin there.
    At most so many `sweeps` of coordinate descent follow.
    """
    errors_started = row_errors(started, wanted, moments)
    values, errors = _feed_errors_forward(wanted.mT, moments)
    better = errors_started < errors
    values = torch.where(better.unsqueeze(1), started.mT, values)
    if sweeps:
        left = float(torch.where(better, errors_started, errors).sum())
        off = values - wanted.mT
    for _ in range(sweeps):
        gained = _descend(values, off, moments)
        left -= gained
        if gained <= ENOUGH * left:
            break
    return values.mT.contiguous()


def row_errors(values: Tensor, wanted: Tensor, moments: Tensor) -> Tensor:
    """Mean squared output error of every row, `[G, O]`."""
    error = values - wanted
    return (error @ moments).mul_(error).sum(-1)


def round_to_grid(values: Tensor) -> Tensor:
    """The nearest of MXFP4's values 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign; a tie goes to the even code."""
    # The power of two at or below the magnitude, from its exponent's bits: many times faster than comparing.
    magnitude = values.abs().clamp_(1, 4)
    step = magnitude.view(torch.int32).bitwise_and_(EXPONENT_BITS).view(torch.float32).mul_(0.5)
    return (values / step).round_().mul_(step).clamp_(-LARGEST_VALUE, LARGEST_VALUE)


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks `[..., out, in/32, 16]` and scales of float32 `values [..., out, in]` that MXFP4 holds exactly.

    What `quantise_mxfp4` gives for such values, which the specification's scale serves, many times faster.
    """
    groups = values.unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(-1)
    exponent = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    exponent = torch.where(largest > 0, exponent, -SCALE_BIAS).clamp(min=-SCALE_BIAS)
    scaled = torch.ldexp(groups, -exponent.unsqueeze(-1))
    # Exponent and first bit of the mantissa number the codes from 1 (code 2) on; 0.5 and 0 come below.
    magnitude = scaled.abs()
    code = (magnitude.view(torch.int32) >> 22).sub_(CODE_BITS).clamp_(min=0)
    code = torch.maximum(code, (magnitude > 0).int()).to(torch.uint8) | (torch.signbit(scaled).byte() << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4), (exponent + SCALE_BIAS).to(torch.uint8)


def _units(block: Tensor) -> Tensor:
    """The scales to try for `block [G, 32, O]`, `[G, C, O]`: first the MX specification's."""
    largest = block.abs().amax(1, keepdim=True)
    exponent = (torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT).clamp(min=SMALLEST_EXPONENT)
    return torch.exp2(torch.cat([exponent, exponent + 1, exponent - 1], dim=1).float())


def _feed_errors_forward(aim: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ over blocks, the ones with the largest inputs first, and so within each block.

    `aim [G, I, O]` -> values of that shape and the rows' errors `[G, O]`.
    """
    order = _columns_by_energy(moments)  # [G, I]
    columns = order.unsqueeze(-1).expand_as(aim)
    left = aim.gather(1, columns)
    spread = _error_spread(moments, order)
    values = torch.empty_like(left)
    total = aim.new_zeros(aim.shape[0], aim.shape[2])
    errors = torch.empty_like(left[:, :PASSED_ON_AT_ONCE])
    width = aim.shape[1]
    for first in range(0, width, PASSED_ON_AT_ONCE):
        last = min(first + PASSED_ON_AT_ONCE, width)
        for here in _blocks(first, last):
            values[:, here], error = _round_block(left[:, here], spread[:, here, here])
            total += error.square().sum(1)
            errors[:, here.start - first : here.stop - first] = error
            _pass_on(left[:, here.stop : last], spread[:, here, here.stop : last], error)
        _pass_on(left[:, last:], spread[:, first:last, last:], errors[:, : last - first])
    return torch.empty_like(values).scatter_(1, columns, values), total


def _pass_on(left: Tensor, spread: Tensor, errors: Tensor) -> None:
    """Have `left [G, I, O]` undo `errors [G, J, O]`, by `spread [G, J, I]`."""
    if left.shape[1]:
        left.baddbmm_(spread.mT, errors, alpha=-1)


def _columns_by_energy(moments: Tensor) -> Tensor:
    """All columns `[G, I]`: blocks by what comes in through them, largest first, and columns within each."""
    blocks: Tensor = moments.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, BLOCK))  # [G, I / 32, 32]
    of_block = blocks.sum(-1).argsort(-1, descending=True)
    in_block = blocks.argsort(-1, descending=True)
    ordered = in_block.gather(1, of_block.unsqueeze(-1).expand_as(in_block))
    return (ordered + of_block.unsqueeze(-1) * BLOCK).flatten(1)


def _error_spread(moments: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U with U' U = H^-1, columns in `order`: how GPTQ passes errors on, `[G, I, I]`.

    With J H J = L L' (J reverses) it is (J L J)^-1: no inverse of H is formed.
    """
    back = order.flip(-1)
    square = moments.gather(-2, back.unsqueeze(-1).expand_as(moments))
    square = square.gather(-1, back.unsqueeze(-2).expand_as(moments))
    factor = torch.linalg.cholesky(square).flip(-1, -2)
    return _inverse_of_triangle(factor)


def _inverse_of_triangle(upper: Tensor) -> Tensor:
    """Of an upper triangular `[G, n, n]`."""
    size = upper.shape[-1]
    if size <= SMALL_TRIANGLE:
        identity = torch.eye(size, device=upper.device, dtype=upper.dtype)
        small: Tensor = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
        return small
    first, last = slice(size // 2), slice(size // 2, size)
    inverse = torch.zeros_like(upper)
    inverse[:, first, first] = _inverse_of_triangle(upper[:, first, first])
    inverse[:, last, last] = _inverse_of_triangle(upper[:, last, last])
    corner = inverse[:, first, first] @ upper[:, first, last] @ inverse[:, last, last]
    inverse[:, first, last] = corner.neg_()
    return inverse


def _round_block(block: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Round `block [G, 32, O]` in order on several scales, keep the best for every row.

    Returns the values and the errors over the diagonal of `spread [G, 32, 32]`, both `[G, 32, O]`: the
    square sum of these is what GPTQ adds to the output error of the row.
    """
    unit = _units(block)
    values, errors = _tried(block, unit), _tried(block, unit)
    for j in range(BLOCK):
        left = block[:, j, None] - _combined(spread[:, :j, j], errors)
        values[:, j] = round_to_grid(left / unit) * unit
        errors[:, j] = (left - values[:, j]) / spread[:, j, j, None, None]
    best = errors.square().sum(1).argmin(1)
    return _pick(values, best), _pick(errors, best)


def _tried(block: Tensor, unit: Tensor) -> Tensor:
    """Room for what every scale makes of a block, `[G, 32, C, O]`."""
    return block.new_empty(*block.shape[:2], *unit.shape[1:])


def _combined(weights: Tensor, tried: Tensor) -> Tensor:
    """Of the first j columns of `tried [G, 32, C, O]` the sum by `weights [G, j]`, `[G, C, O]`."""
    first = tried[:, : weights.shape[1]].flatten(2)
    return torch.bmm(weights.unsqueeze(1), first).view(tried.shape[0], *tried.shape[2:])


def _pick(tried: Tensor, best: Tensor) -> Tensor:
    """Of `tried [G, 32, C, O]` the entry `best [G, O]` of every row, `[G, 32, O]`."""
    index = best[:, None, None].expand(-1, tried.shape[1], 1, -1)
    return tried.gather(2, index).squeeze(2)


def _descend(values: Tensor, off: Tensor, moments: Tensor) -> float:
    """One sweep of coordinate descent over all blocks of `values [G, I, O]`, in place.

    `off [G, I, O]` is what the values are off by, and kept so. No row's error grows; returns by how much
    their sum shrinks.
    """
    gained = 0.0
    for here in _blocks(0, values.shape[1]):
        slope = moments[:, here] @ off  # half the gradient, [G, 32, O]
        moved, change = _descend_block(values[:, here], slope, moments[:, here, here])
        values[:, here] += moved
        off[:, here] += moved
        gained -= float(change.sum())
    return gained


def _blocks(first: int, last: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(first, last, BLOCK))


def _descend_block(block: Tensor, slope: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Move every column of `block [G, 32, O]` to its best value in turn, on the best of several scales.

    Returns the moves `[G, 32, O]` and what they change the rows' errors by, `[G, O]`. On a scale that holds
    the current values a pass over the columns cannot make the error larger: that is the first that is tried,
    or a coarser one, on which they are too if none is over 3.
    """
    unit = _units(block)
    moved = _tried(block, unit)
    change = torch.zeros_like(unit)
    for j in range(BLOCK):
        steep = slope[:, j, None] + _combined(moments[:, j, :j], moved)
        curve = moments[:, j, j, None, None]
        now = block[:, j, None]
        moved[:, j] = round_to_grid((now - steep / curve) / unit) * unit - now
        change += moved[:, j] * (2 * steep + curve * moved[:, j])
    best = change.argmin(1)
    least = change.gather(1, best.unsqueeze(1)).squeeze(1)
    lower = least < 0
    return _pick(moved, best) * lower.unsqueeze(1), least * lower
