"""Prices of the units of a training step (finetune/predict/units.py), from the times of probes.

Probes repeat to some 30% on a shared machine, and many of them hold several units in like amounts, so that
times alone would make one unit dear and the next free. So prices are drawn to what is typical: they are the
likeliest ones if times scatter by a tenth or so and prices, but for one factor of the whole machine, by about
a third around the typical ones. Both scatter by factors, so no price can be negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# As two cores of an AMD EPYC with AVX-512 have them, rounded; FLOPs and values by their dtype.
TYPICAL = {
    "bf16": {"products": 1.1e-12, "scores": 2.7e-10, "expert weights": 5e-11, "rows": 1.2e-9, "stream": 5e-9,
             "head products": 2e-12},
    "float32": {"products": 1.9e-12, "scores": 3.2e-10, "expert weights": 8e-11, "rows": 1.8e-9,
                "stream": 7e-9, "head products": 3.5e-12},
}  # fmt: skip
TYPICAL_OF_ANY = {
    "factors": 3e-9, "experts": 2e-5, "blocks": 9e-4, "layers": 5e-3, "passes": 1.5e-3,
    "head weights": 8e-10, "head tiles": 1e-4, "logits": 4e-9,
}  # fmt: skip
# (A tenth over a third) squared: how much the typical prices count beside a probe.
WEIGHT = 0.1
# Of Newton's method, whose steps are bounded so that prices move by a factor of 1.6 at most; some 6 suffice.
STEPS, LONGEST_STEP = 50, 0.5


def fit_prices(units: Sequence[dict[str, float]], seconds: Sequence[float], dense: str) -> dict[str, float]:
    """Seconds of one of each unit; `units` are counted in probes that took so many `seconds`."""
    typical = TYPICAL[dense] | TYPICAL_OF_ANY
    names = list(units[0])
    counted = torch.tensor([[each[name] * typical[name] for name in names] for each in units]).double()
    times = torch.tensor(seconds).double()
    scale = (times / counted.sum(1)).log().mean().exp()
    factors = _likeliest(counted * scale, times)
    return {name: typical[name] * float(scale * factor) for name, factor in zip(names, factors, strict=True)}


def _likeliest(counted: Tensor, times: Tensor) -> Tensor:
    """Factors of prices `[units]`, by Gauss and Newton's method on their logarithms.

    `counted [probes, units]` are seconds at the typical prices, `times [probes]` those measured.
    """
    logs = counted.new_zeros(counted.shape[1])
    for _ in range(STEPS):
        parts = counted * logs.exp()
        total = parts.sum(1)
        off, slopes = (total / times).log(), parts / total.unsqueeze(1)
        curve = slopes.mT @ slopes + WEIGHT * torch.eye(len(logs), dtype=logs.dtype)
        step = torch.linalg.solve(curve, slopes.mT @ off + WEIGHT * logs)
        logs -= step.clamp(-LONGEST_STEP, LONGEST_STEP)
    return logs.exp()
