"""How far two programs' logits are apart, and whether they would say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """Between two programs' logits; `typical` is the median over positions of a position's mean."""

    largest: float
    mean: float
    typical: float

    @classmethod
    def between(cls, some: Sequence[Tensor], others: Sequence[Tensor]) -> Distance:
        apart = torch.cat([(one - other).abs() for one, other in zip(some, others, strict=True)])
        return cls(float(apart.max()), float(apart.mean()), float(apart.mean(-1).median()))

    def times(self, factor: float) -> Distance:
        return Distance(factor * self.largest, factor * self.mean, factor * self.typical)


@dataclass(frozen=True)
class Greedy:
    """Next tokens of the answers: how many there are, are equal, and differ though the first was decided."""

    total: int
    equal: int
    wrong: int

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], first: list[Tensor], second: list[Tensor], undecided: float
    ) -> Greedy:
        """`first` is decided where its best logit is more than `undecided` above the next."""
        total = equal = wrong = 0
        for prompt, one, other in zip(prompts, first, second, strict=True):
            answered = slice(len(prompt) - 1, len(one) - 1)
            best = one[answered].topk(2).values
            same = one[answered].argmax(-1) == other[answered].argmax(-1)
            equal, total = equal + int(same.sum()), total + len(same)
            wrong += int((~same & (best[:, 0] - best[:, 1] > undecided)).sum())
        return cls(total, equal, wrong)
