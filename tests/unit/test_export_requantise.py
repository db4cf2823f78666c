"""Rounding that keeps outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.export import requantise as requantising
from finetune.export.requantise import pack, requantise, round_to_grid, row_errors
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


def test_values_are_packed_as_rounding_to_the_nearest_would() -> None:
    torch.manual_seed(0)
    values = nearest(torch.randn(200, INPUTS) * torch.logspace(-30, 6, 200).unsqueeze(1))
    values[:, :40] *= torch.rand(200, 40) > 0.9
    values[:3] = torch.tensor([0.0, -0.0, 6.0]).unsqueeze(1)
    for packed, expected in zip(pack(values), quantise_mxfp4(values), strict=True):
        assert torch.equal(packed, expected)


def test_triangles_are_inverted_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    upper = torch.randn(2, 75, 75, dtype=torch.float64).triu() + 9 * torch.eye(75, dtype=torch.float64)
    monkeypatch.setattr(requantising, "SMALL_TRIANGLE", 8)
    torch.testing.assert_close(requantising._inverse_of_triangle(upper), torch.linalg.inv(upper))


def test_how_many_columns_pass_errors_on_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    base, moments = base_and_moments()
    wanted = base + low_rank(0.05)
    errors = []
    for at_once in (32, 64):
        monkeypatch.setattr(requantising, "PASSED_ON_AT_ONCE", at_once)
        errors.append(row_errors(requantise(wanted, moments, base, sweeps=0), wanted, moments).sum())
    assert torch.isclose(errors[0], errors[1], rtol=1e-3)
