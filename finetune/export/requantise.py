"""Rounding to MXFP4 so that outputs stay, not weights: error feedback, then coordinate descent on the codes.

A linear map's rows are rounded each for itself. Of a row w that is wanted and a row q of MXFP4 values, with
inputs x that the map will meet, the error is

    (q - w) H (q - w)'     H = mean of x x' over the inputs, plus damping

First w is rounded column by column, each column's error passed on to the columns that follow, where it is
undone as well as they can (Frantar et al. 2022, "GPTQ", algorithm 1). Then, block by block of 32 columns,
codes are chosen anew given all others until little changes. In both, every block tries several scales and
keeps the one whose error is smallest.

Letters in shapes: G maps at once, O rows (outputs), I columns (inputs), C scales that are tried.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.model.layout import BLOCK
from finetune.model.mxfp4 import LARGEST_EXPONENT

LARGEST_VALUE = 6.0
# Smaller blocks than these are zero to any computation in float32 that uses them.
SMALLEST_EXPONENT = -100
# A sweep over all blocks that improves the error by less than this share is the last.
ENOUGH = 1e-3


def requantise(wanted: Tensor, moments: Tensor, started: Tensor | None = None, *, sweeps: int = 8) -> Tensor:
    """MXFP4 values for `wanted [G, O, I]` that keep the outputs; all float32.

    `moments [G, I, I]` are the inputs' second moments, damped so that they are positive definite. `started
    [G, O, I]`, MXFP4 values, is another start: rows that it serves better than error feedback begin there.
    """
    values = _feed_errors_forward(wanted, moments)
    if started is not None:
        better = row_errors(started, wanted, moments) < row_errors(values, wanted, moments)
        values = torch.where(better.unsqueeze(-1), started, values)
    before = row_errors(values, wanted, moments).sum()
    for _ in range(sweeps):
        _descend(values, wanted, moments)
        after = row_errors(values, wanted, moments).sum()
        if after >= before * (1 - ENOUGH):
            break
        before = after
    return values


def row_errors(values: Tensor, wanted: Tensor, moments: Tensor) -> Tensor:
    """Mean squared output error of every row, `[G, O]`."""
    error = values - wanted
    return ((error @ moments) * error).sum(-1)


def round_to_grid(values: Tensor) -> Tensor:
    """The nearest of MXFP4's values 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign; a tie goes to the even code."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (values / step).round_().mul_(step).clamp_(-LARGEST_VALUE, LARGEST_VALUE)


def _specified_exponent(block: Tensor) -> Tensor:
    """The exponent that the MX specification gives a block `[..., 32]`, `[..., 1]`."""
    largest = block.abs().amax(-1, keepdim=True)
    return (torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT).clamp(min=SMALLEST_EXPONENT)


def _feed_errors_forward(wanted: Tensor, moments: Tensor) -> Tensor:
    """GPTQ over blocks, the ones with the largest inputs first, and so within each block."""
    order = _columns_by_energy(moments)  # [G, I]
    rows = order.unsqueeze(-2).expand_as(wanted)
    left = wanted.gather(-1, rows)
    spread = _error_spread(moments, order)
    values = torch.empty_like(wanted)
    for first in range(0, left.shape[-1], BLOCK):
        columns = slice(first, first + BLOCK)
        block = left[..., columns]
        exponent = _specified_exponent(block)
        tried = torch.stack([torch.exp2((exponent + up).float()) for up in (-1, 0, 1)])
        chosen, error = _round_block(block, spread[:, columns, columns], tried)
        values[..., columns] = chosen
        if columns.stop < left.shape[-1]:
            left[..., columns.stop :] -= error @ spread[:, columns, columns.stop :]
    return torch.empty_like(values).scatter_(-1, rows, values)


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
    identity = torch.eye(factor.shape[-1], device=factor.device, dtype=factor.dtype)
    spread: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True)
    return spread


def _round_block(block: Tensor, spread: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Round `block [G, O, 32]` in order with each of `scales [C, G, O, 1]`, keep the best for every row.

    Returns the values and the errors over the spread's diagonal, both `[G, O, 32]`: the square sum of these
    is what GPTQ adds to the output error of the row.
    """
    left = block.expand(len(scales), *block.shape).clone()
    values, errors = torch.empty_like(left), torch.empty_like(left)
    unit = scales.squeeze(-1)
    for j in range(BLOCK):
        values[..., j] = round_to_grid(left[..., j] / unit) * unit
        errors[..., j] = (left[..., j] - values[..., j]) / spread[:, j, j, None]
        left[..., j + 1 :] -= errors[..., j, None] * spread[:, None, j, j + 1 :]
    best = errors.square().sum(-1).argmin(0)
    return _pick(values, best), _pick(errors, best)


def _pick(tried: Tensor, best: Tensor) -> Tensor:
    """Of `tried [C, G, O, 32]` the entry `best [G, O]` of every row."""
    return tried.gather(0, best[None, :, :, None].expand(1, *tried.shape[1:])).squeeze(0)


def _descend(values: Tensor, wanted: Tensor, moments: Tensor) -> None:
    """One sweep of coordinate descent over all blocks, in place; no row's error grows."""
    for columns in _blocks(values.shape[-1]):
        slope = (values - wanted) @ moments[..., columns]  # half the gradient, [G, O, 32]
        block = values[..., columns]
        exponent = _specified_exponent(block)
        # The first grid holds the current values: those of a coarser one with none over 3 are on it too.
        tried = torch.stack([torch.exp2((exponent + up).float()) for up in (0, 1, -1)])
        block.copy_(_descend_block(block, wanted[..., columns], slope, moments[:, columns, columns], tried))


def _blocks(width: int) -> Iterator[slice]:
    return (slice(first, first + BLOCK) for first in range(0, width, BLOCK))


def _descend_block(block: Tensor, wanted: Tensor, slope: Tensor, moments: Tensor, scales: Tensor) -> Tensor:
    """The block with every column moved to its best value in turn, on the best of `scales [C, G, O, 1]`.

    On a grid that holds the current values, a pass over the columns cannot make the error larger.
    """
    now = block.expand(len(scales), *block.shape).clone()
    slopes = slope.expand_as(now).clone()
    unit = scales.squeeze(-1)
    for j in range(BLOCK):
        best = now[..., j] - slopes[..., j] / moments[:, j, j, None]
        moved = round_to_grid(best / unit) * unit - now[..., j]
        now[..., j] += moved
        slopes += moved.unsqueeze(-1) * moments[:, None, j, :]
    # Of an error d H d, moving by m changes it by m (2 H d + H m), and slopes went from H d to H d + H m.
    change = ((now - block) * (slope + slopes)).sum(-1)
    return torch.where(change.amin(0).unsqueeze(-1) < 0, _pick(now, change.argmin(0)), block)
