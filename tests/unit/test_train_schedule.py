"""The learning rate's course."""

from __future__ import annotations

import pytest

from finetune.train.schedule import Shape, learning_rate_factor


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_every_step_learns_and_the_rate_rises_to_its_peak(shape: Shape, warmup: int) -> None:
    factors = [learning_rate_factor(step, 20, warmup, shape) for step in range(20)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup] == 1.0


def test_the_rate_falls_to_almost_nothing_unless_it_is_constant() -> None:
    assert learning_rate_factor(99, 100, 3, "cosine") < 0.001
    assert learning_rate_factor(99, 100, 3, "linear") == pytest.approx(1 / 97)
    assert learning_rate_factor(99, 100, 3, "constant") == 1.0


def test_going_on_past_the_planned_end_gives_no_negative_rate() -> None:
    assert learning_rate_factor(30, 20, 2, "linear") == 0.0
