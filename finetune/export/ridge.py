"""Linear maps fitted to rows, also to few of them.

A fit to rows that are few beside its columns goes astray at all others. There the inputs' second moments are
drawn to a multiple of the identity by as much as the number of rows asks for, and the change that is found is
scaled to what best explains rows that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

# With so many rows to a column, moments are taken as they are.
MANY = 4
# What is treated at once; they bound the memory.
OUTPUTS_AT_ONCE, ROWS_AT_ONCE = 1024, 1024
# Of the share by which moments are drawn to the identity; at 1 nothing of the rows would be left.
MOST_SHRINKAGE = 0.99


class Ridge:
    """Inputs of a map, `[n, in]`, of which row i counts `weight[i]`; the weights' sum is 1.

    At least the share `least` of the mean second moment is added to each input's own.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, least: float) -> None:
        rows, width = inputs.shape
        self._few = rows < MANY * width
        self._inputs, self._weight = inputs, weight.unsqueeze(1)
        self.moments = inputs.mT @ (inputs * self._weight)  # [in, in], damped
        self._added = _damping(self.moments, weight if self._few else None, least)
        self.moments.diagonal().add_(self._added)

    def solve(self, lacking: Iterable[Tensor]) -> Tensor:
        """The change `[out, in]` that gives what is lacking: `[n, m]` of some outputs, then of the next."""
        if not self._few:
            root = torch.linalg.cholesky(self.moments)
            sums = (self._inputs.mT @ (some * self._weight) for some in lacking)
            return torch.cat([torch.cholesky_solve(some, root).mT for some in sums])
        changes, products, squares = [], 0.0, 0.0
        for some in lacking:
            change, explained = self._fit(some)
            products += float(self._weight.mT @ (explained * some).sum(1, keepdim=True))
            squares += float(self._weight.mT @ explained.square_().sum(1, keepdim=True))
            changes.append(change)
        return torch.cat(changes).mul_(max(0.0, products / max(squares, 1e-30)))

    def _fit(self, lacking: Tensor) -> tuple[Tensor, Tensor]:
        """The change, and what a fit to all other rows makes of each of `lacking [n, out]`."""
        inverse, inputs = self._inverse, self._inputs
        if self._by_rows:
            root = self._weight.sqrt()
            dual = inverse @ (lacking * root)
            change = (dual * root).mT @ inputs
            return change, lacking - dual.div_(inverse.diagonal().unsqueeze(1) * root)
        change = (inputs.mT @ (lacking * self._weight)).mT @ inverse
        left_out = (lacking - inputs @ change.mT).div_(1 - self._leverage)
        return change, lacking - left_out

    @property
    def _by_rows(self) -> bool:
        """Whether products of rows with each other are fewer than those of columns."""
        rows, width = self._inputs.shape
        return rows < width

    @cached_property
    def _inverse(self) -> Tensor:
        """Of the damped products, `[n, n]` or `[in, in]`."""
        if not self._by_rows:
            return torch.cholesky_inverse(torch.linalg.cholesky(self.moments))
        inputs = self._inputs * self._weight.sqrt()
        square = inputs @ inputs.mT
        square.diagonal().add_(self._added)
        return torch.cholesky_inverse(torch.linalg.cholesky(square))

    @cached_property
    def _leverage(self) -> Tensor:
        """How much each row decides about itself, `[n, 1]`."""
        parts = [((part @ self._inverse).mul_(part)).sum(1) for part in self._inputs.split(ROWS_AT_ONCE)]
        return self._weight * torch.cat(parts).unsqueeze(1)


def _damping(moments: Tensor, weight: Tensor | None, least: float) -> float:
    """What to add to the diagonal; 1 where nothing is on it. With `weight [n]` it depends on their number.

    The share by which moments are drawn to the identity is the "oracle approximating shrinkage" of Chen et
    al. 2010 (IEEE Transactions on Signal Processing 58, equation 23).
    """
    width, mean = len(moments), float(moments.diagonal().mean())
    if mean <= 0:
        return 1.0
    if weight is None:
        return mean * least
    rows = 1 / float(weight.square().sum())
    squares, trace = float(moments.norm()) ** 2, mean * width
    apart = (rows + 1 - 2 / width) * (squares - trace**2 / width)
    wanted = (1 - 2 / width) * squares + trace**2
    shrinkage = min(wanted / apart, MOST_SHRINKAGE) if apart > 0 else MOST_SHRINKAGE
    return mean * max(least, shrinkage / (1 - shrinkage))
