"""How sure a score is."""

from __future__ import annotations

import math

# The 97.5th percentile of the standard normal distribution: two sides of a 95% interval.
Z_95 = 1.959963984540054


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion, `right` out of `n`, as (low, high) within 0..1.

    Unlike the textbook interval it stays inside 0..1 and is not empty at 0% or 100% (Wilson, 1927). Nothing
    measured (`n` of 0) says nothing: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    share = right / n
    scale = 1 / (1 + Z_95**2 / n)
    centre = scale * (share + Z_95**2 / (2 * n))
    half = scale * Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    # At 0 or n right the exact bound is 0 or 1; rounding would leave it 1e-17 beside.
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == n else centre + half
    return low, high
