"""Rounding that keeps outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.export.requantise import requantise, round_to_grid, row_errors
from finetune.model.mxfp4 import CODE_VALUES, dequantise_mxfp4, quantise_mxfp4

MAPS, OUTPUTS, INPUTS = 3, 40, 96


def nearest(weights: Tensor) -> Tensor:
    return dequantise_mxfp4(*quantise_mxfp4(weights), torch.float32)


def base_and_moments(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights that MXFP4 holds, and second moments of inputs that resemble each other."""
    torch.manual_seed(seed)
    inputs = torch.randn(MAPS, 300, INPUTS) @ torch.randn(MAPS, INPUTS, INPUTS) * INPUTS**-0.5
    moments = inputs.mT @ inputs / 300
    moments.diagonal(dim1=-2, dim2=-1).add_(0.01)
    return nearest(torch.randn(MAPS, OUTPUTS, INPUTS) * INPUTS**-0.5), moments


def low_rank(size: float) -> Tensor:
    return size * torch.randn(MAPS, OUTPUTS, 4) @ torch.randn(MAPS, 4, INPUTS)


def test_the_grid_is_that_of_the_number_format() -> None:
    values = torch.linspace(-7, 7, 4001)
    codes = torch.tensor(CODE_VALUES)
    distance = (round_to_grid(values) - values).abs()
    assert torch.equal(distance, (codes - values.unsqueeze(-1)).abs().amin(-1))
    assert round_to_grid(torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0])).tolist() == [0, 1, 1, 2, 4, 4]


def test_values_that_mxfp4_holds_stay_as_they_are() -> None:
    base, moments = base_and_moments()
    assert torch.equal(requantise(base, moments, base, sweeps=8), base)
    assert torch.equal(requantise(base, moments, torch.zeros_like(base), sweeps=0), base)


def test_output_errors_are_less_than_half_of_those_of_nearest_rounding() -> None:
    base, moments = base_and_moments()
    for size in (0.01, 0.1):
        wanted = base + low_rank(size)
        ours = row_errors(requantise(wanted, moments, base, sweeps=8), wanted, moments).sum()
        assert ours < 0.5 * row_errors(nearest(wanted), wanted, moments).sum()


def test_no_row_is_worse_than_its_start() -> None:
    base, moments = base_and_moments()
    wanted = base + low_rank(0.001)
    start = row_errors(base, wanted, moments)
    ours = row_errors(requantise(wanted, moments, base, sweeps=8), wanted, moments)
    assert (ours <= start * (1 + 1e-5)).all()


def test_every_result_is_held_exactly() -> None:
    base, moments = base_and_moments()
    values = requantise(base + low_rank(0.05), moments, base, sweeps=8)
    assert torch.equal(nearest(values), values)


def test_columns_that_nothing_comes_in_through_are_rounded_all_the_same() -> None:
    base, moments = base_and_moments()
    moments[:, :40], moments[:, :, :40] = 0, 0
    moments.diagonal(dim1=-2, dim2=-1).add_(1e-3)
    wanted = base + low_rank(0.05)
    assert (requantise(wanted, moments, base, sweeps=8) - wanted).abs().max() < 0.2
