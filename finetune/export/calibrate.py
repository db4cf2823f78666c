"""A layer's experts, merged with the adapter and rounded to MXFP4, fitted to what passes through them.

Two paths run side by side: that of the tuned model, and that of the export, whose earlier layers are rounded
already. An expert of the export gets the export's inputs. It is rounded so that it gives what the tuned
model's expert gives for its own inputs, plus what the export's residual stream lacks by now: every layer
mends what it can of all that went wrong before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.export.requantise import requantise
from finetune.model.expert_layer import Factors, clamped_swiglu
from finetune.model.experts import PackedExperts
from finetune.model.layout import BLOCK
from finetune.model.mxfp4 import dequantise_mxfp4, quantise_mxfp4

PROJECTIONS = ("gate_up_proj", "down_proj")
# Share of the mean second moment that is added to each input's own, so that few or alike rows do not decide
# everything.
DAMPING = 0.003


@dataclass(frozen=True)
class Rows:
    """The n tokens that the export routes to an expert."""

    tuned: Tensor  # [n, H]: the layer's normed inputs on the tuned path
    export: Tensor  # [n, H]: and on the export's
    missing: Tensor  # [n, H]: what the experts are to add to the tuned model's experts' output
    weight: Tensor  # [n]: how much an error counts


def round_to_nearest(experts: PackedExperts, factors: Mapping[str, Factors]) -> int:
    """Merge `factors` in and round each weight for itself; returns how many packed values changed."""
    changed = 0
    for first, last in _groups(experts):
        for name in PROJECTIONS:
            if name in factors:
                wanted, _ = _merged(experts, name, first, last, factors)
                changed += _store(
                    experts, name, first, dequantise_mxfp4(*quantise_mxfp4(wanted), wanted.dtype)
                )
    return changed


def fit(
    experts: PackedExperts, factors: Mapping[str, Factors], routed: Callable[[int], Rows], *, sweeps: int
) -> int:
    """Merge `factors` in so that outputs stay; returns how many packed values changed.

    `routed(e)` gives what comes to expert e. A weight that the adapter does not change keeps its bytes.
    `sweeps` as `requantise` takes them.
    """
    changed = 0
    for first, last in _groups(experts):
        rows = [routed(number) for number in range(first, last)]
        tuned, export = [r.tuned for r in rows], [r.export for r in rows]
        for name in PROJECTIONS:
            wanted, touched = _merged(experts, name, first, last, factors)
            values = _decoded(experts, name, first, last)
            missing = [r.missing if name == "down_proj" else None for r in rows]
            found = touched.nonzero().flatten().tolist()
            parts = [
                _Part(tuned[i], export[i], wanted[i], values[i], rows[i].weight, missing[i]) for i in found
            ]
            if parts:
                values[found] = _fitted(parts, sweeps)
                changed += _store(experts, name, first, values)
            if name == "gate_up_proj":
                tuned = [_activated(experts, first + i, x, wanted[i]) for i, x in enumerate(tuned)]
                export = [_activated(experts, first + i, x, values[i]) for i, x in enumerate(export)]
    return changed


@dataclass(frozen=True)
class _Part:
    """One weight of one expert: `wanted` and what it `was`, `[out, in]`; inputs of both paths, `[n, in]`."""

    tuned: Tensor
    export: Tensor
    wanted: Tensor
    was: Tensor
    weight: Tensor  # [n]
    missing: Tensor | None  # [n, out]

    def moments(self) -> Tensor:
        """Second moments of the export's inputs, damped, `[in, in]`."""
        moments = (self.export * self.weight.unsqueeze(1)).mT @ self.export
        mean = moments.diagonal().mean()
        # An expert without a row is rounded as if all inputs were alike.
        moments.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
        return moments

    def lacking(self) -> Tensor:
        """The export's inputs times what its outputs lack with the wanted weights, `[in, out]`."""
        lack = (self.tuned - self.export) @ self.wanted.mT
        if self.missing is not None:
            lack += self.missing
        return (self.export * self.weight.unsqueeze(1)).mT @ lack


def _fitted(parts: Sequence[_Part], sweeps: int) -> Tensor:
    """MXFP4 values `[g, out, in]`."""
    moments = torch.stack([part.moments() for part in parts])
    lacking = torch.stack([part.lacking() for part in parts])
    # Least squares gives the best unrounded weights; the damping draws them to the wanted ones.
    shift = torch.cholesky_solve(lacking, torch.linalg.cholesky(moments)).mT
    wanted = torch.stack([part.wanted for part in parts]) + shift
    return requantise(wanted, moments, torch.stack([part.was for part in parts]), sweeps=sweeps)


def _groups(experts: PackedExperts) -> list[tuple[int, int]]:
    """Experts that are fitted at once: as many as the expert layer decodes at once."""
    size, count = experts.group_size(), experts.num_experts
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _decoded(experts: PackedExperts, name: str, first: int, last: int) -> Tensor:
    """`[g, out, in]` float32, in memory of its own."""
    blocks, scales = experts.get_parameter(name), experts.get_parameter(f"{name}_scales")
    return dequantise_mxfp4(blocks[first:last], scales[first:last], torch.float32)


def _merged(
    experts: PackedExperts, name: str, first: int, last: int, factors: Mapping[str, Factors]
) -> tuple[Tensor, Tensor]:
    """`W + B A` of some experts, `[g, out, in]` float32, and which of them the adapter changes, `[g]`."""
    weights = _decoded(experts, name, first, last)
    if name not in factors:
        return weights, torch.zeros(last - first, dtype=torch.bool)
    delta = factors[name].b[first:last] @ factors[name].a[first:last]
    return weights + delta, delta.flatten(1).any(1)


def _activated(experts: PackedExperts, number: int, rows: Tensor, weights: Tensor) -> Tensor:
    """`rows [n, H]` through an expert's gate_up `weights [2I, H]`: the down projection's inputs, `[n, I]`."""
    y = rows @ weights.mT + experts.gate_up_proj_bias[number]
    return clamped_swiglu(y, experts.alpha, experts.limit)


def _store(experts: PackedExperts, name: str, first: int, values: Tensor) -> int:
    """Pack `values [g, out, in]`; a block whose values are as before keeps its bytes."""
    here = slice(first, first + len(values))
    differs = (_decoded(experts, name, here.start, here.stop) != values).unflatten(-1, (-1, BLOCK))
    moved = differs.any(-1)
    for part, fresh in zip((name, f"{name}_scales"), quantise_mxfp4(values), strict=True):
        stored = experts.get_parameter(part)[here]
        stored.copy_(torch.where(moved.unsqueeze(-1) if fresh.ndim == 4 else moved, fresh, stored))
    return int(differs.sum())
