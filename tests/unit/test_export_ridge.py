"""Linear maps fitted to rows, also to few of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.export.ridge import MANY, MOST_SHRINKAGE, Ridge

WIDTH, OUTPUTS, LEAST = 24, 7, 0.01


def inputs_and_weight(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    alike = torch.randn(WIDTH, WIDTH, dtype=torch.float64) * torch.logspace(0, -1, WIDTH).unsqueeze(1)
    weight = torch.rand(rows, dtype=torch.float64) + 0.5
    return torch.randn(rows, WIDTH, dtype=torch.float64) @ alike, weight / weight.sum()


def ridge_solution(inputs: Tensor, weight: Tensor, lacking: Tensor, added: float) -> Tensor:
    moments = (inputs * weight.unsqueeze(1)).mT @ inputs + added * torch.eye(WIDTH, dtype=inputs.dtype)
    solution: Tensor = torch.linalg.solve(moments, (inputs * weight.unsqueeze(1)).mT @ lacking).mT
    return solution


def added_to(ridge: Ridge, inputs: Tensor, weight: Tensor) -> float:
    return float((ridge.moments - (inputs * weight.unsqueeze(1)).mT @ inputs).diagonal().mean())


def test_many_rows_are_fitted_as_they_are() -> None:
    inputs, weight = inputs_and_weight(MANY * WIDTH)
    lacking = torch.randn(len(inputs), OUTPUTS, dtype=torch.float64)
    ridge = Ridge(inputs, weight, LEAST)
    added = LEAST * float((inputs.square() * weight.unsqueeze(1)).sum(0).mean())
    torch.testing.assert_close(
        ridge.solve(lacking.split(2, dim=1)), ridge_solution(inputs, weight, lacking, added)
    )


@pytest.mark.parametrize("rows", [WIDTH // 2, 2 * WIDTH])
def test_a_fit_to_few_rows_is_scaled_to_what_explains_rows_that_it_leaves_out(rows: int) -> None:
    inputs, weight = inputs_and_weight(rows)
    lacking = inputs @ torch.randn(WIDTH, OUTPUTS, dtype=torch.float64)
    lacking += 2 * torch.randn_like(lacking)
    ridge = Ridge(inputs, weight, LEAST)
    added = added_to(ridge, inputs, weight)
    left_out = []
    for row in range(rows):
        others = torch.arange(rows) != row
        change = ridge_solution(inputs[others], weight[others], lacking[others], added)
        left_out.append(change @ inputs[row])
    explained = torch.stack(left_out)
    of_row = weight.unsqueeze(1)
    worth = (of_row * explained * lacking).sum() / (of_row * explained.square()).sum()
    expected = worth * ridge_solution(inputs, weight, lacking, added)
    torch.testing.assert_close(ridge.solve(lacking.split(2, dim=1)), expected)


@pytest.mark.parametrize("rows", [WIDTH // 2, 2 * WIDTH])
def test_what_a_few_rows_lack_by_chance_changes_next_to_nothing(rows: int) -> None:
    inputs, weight = inputs_and_weight(rows)
    lacking = torch.randn(rows, 500, dtype=torch.float64)
    change = Ridge(inputs, weight, LEAST).solve([lacking])
    unrestrained = ridge_solution(inputs, weight, lacking, LEAST * float(inputs.square().mean()))
    assert change.norm() < 0.1 * unrestrained.norm()


def test_the_fewer_the_rows_the_more_moments_are_drawn_to_the_identity() -> None:
    shares = []
    for rows in (1, 4, 16, 64, MANY * WIDTH):
        inputs, weight = inputs_and_weight(rows)
        added = added_to(Ridge(inputs, weight, LEAST), inputs, weight)
        shares.append(added / (added + float((inputs.square() * weight.unsqueeze(1)).sum(0).mean())))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(MOST_SHRINKAGE)
    assert shares[-1] == pytest.approx(LEAST / (1 + LEAST))


def test_without_a_row_nothing_is_changed_and_all_inputs_count_alike() -> None:
    ridge = Ridge(torch.empty(0, WIDTH), torch.empty(0), LEAST)
    assert torch.equal(ridge.moments, torch.eye(WIDTH))
    assert not ridge.solve([torch.empty(0, OUTPUTS)]).any()
