"""The learning rate's course over a run."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, steps: int, warmup: int, shape: Shape) -> float:
    """What the peak learning rate is multiplied by at `step` (0 for the first) of `steps`.

    It rises in a line over the first `warmup` steps, then falls to nearly 0 at the last one. transformers'
    schedules begin with a factor of 0: a step that learns nothing, after which lora_A has no gradient yet.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if shape == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(steps - warmup, 1))
    return left if shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))
