"""Products of rows with their experts' matrices, through torch's grouped_mm once it has shown to be right.

Some builds of torch return wrong results without a word for views that are transposed (pytorch issue
186365), so every combination of layouts that is used here is tried once on each device and dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# A wrong layout differs by the size of the values, rounding to bfloat16 by 2 ** -8 of it.
PROBE_TOLERANCE = 0.05


def multiply(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`rows [n, K]` times each row's `weights [g, K, M]` -> `[n, M]`; `ends [g]` int32: where rows end."""
    if weights.shape[0] == 1:
        return rows @ weights[0]
    if grouped_mm_is_right(rows.device, rows.dtype):
        return F.grouped_mm(rows, weights, offs=ends)
    return _multiply_one_by_one(rows, weights, ends)


def outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum over each expert's rows of `left [n, M]` outer `right [n, K]` -> `[g, M, K]`; every one has rows.

    Without rows Hopper's kernel hangs in some builds of torch (pytorch issue 152668), or writes nothing.
    """
    if ends.numel() == 1:
        return (left.t() @ right).unsqueeze(0)
    if grouped_mm_is_right(left.device, left.dtype):
        return F.grouped_mm(left.t(), right, offs=ends)
    return _outer_one_by_one(left, right, ends)


def _multiply_one_by_one(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, place in _slices(ends):
        torch.mm(rows[place], weights[expert], out=out[place])
    return out


def _outer_one_by_one(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    out = left.new_zeros(ends.numel(), left.shape[1], right.shape[1])
    for expert, place in _slices(ends):
        torch.mm(left[place].t(), right[place], out=out[expert])
    return out


def _slices(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts with rows, and their rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


@cache
def grouped_mm_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build's grouped_mm gives what products one by one give, in the layouts used here."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False  # not supported there
    if device.type == "cuda" and dtype != torch.bfloat16:
        return False  # nor there
    try:
        wrong = _find_wrong_layout(device, dtype)
    except RuntimeError as error:
        wrong = str(error).splitlines()[0]
    if wrong:
        logger.warning("grouped_mm is not usable on %s (%s): products go one by one", device, wrong)
    return not wrong


def _find_wrong_layout(device: torch.device, dtype: torch.dtype) -> str:
    random = torch.Generator().manual_seed(0)
    n, inner, outer_size, width = 96, 64, 80, 72

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    ends = torch.tensor([40, 40, 96], dtype=torch.int32, device=device)
    rows, weights, d_out = values(n, width), values(3, outer_size, width), values(n, outer_size)
    narrow = rows[:, :inner]  # rows within wider ones, as everywhere here
    trials = {
        "transposed weights": (rows, weights.transpose(1, 2)),
        "plain weights": (d_out, weights),
        "rows within wider ones": (narrow, values(3, 16, inner).transpose(1, 2)),
    }
    for name, (left, right) in trials.items():
        if _differ(F.grouped_mm(left, right, offs=ends), _multiply_one_by_one(left, right, ends)):
            return name
    ends = ends[1:]  # without the expert that has no rows
    found, expected = F.grouped_mm(d_out.t(), narrow, offs=ends), _outer_one_by_one(d_out, narrow, ends)
    return "outer products" if _differ(found, expected) else ""


def _differ(found: Tensor, expected: Tensor) -> bool:
    """NaN differs from everything."""
    return not bool((found - expected).abs().max() <= PROBE_TOLERANCE * expected.abs().max())
