"""A layer's experts, merged with the adapter and rounded to MXFP4, fitted to what passes through them.

Two paths run side by side: that of the tuned model, and that of the export, whose earlier layers are rounded
already. An expert of the export gets the export's inputs. It is rounded so that it gives what the tuned
model's expert gives for its own inputs, plus what the export's residual stream lacks by now: every layer
mends what it can of all that went wrong before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.export.requantise import pack, requantise
from finetune.export.ridge import OUTPUTS_AT_ONCE, Ridge
from finetune.model.cpu_settings import return_freed_memory
from finetune.model.expert_layer import Factors, clamped_swiglu
from finetune.model.experts import PackedExperts
from finetune.model.layout import BLOCK
from finetune.model.mxfp4 import dequantise_mxfp4, quantise_mxfp4

PROJECTIONS = ("gate_up_proj", "down_proj")
# Share of the mean second moment that is added to each input's own, so that few or alike rows do not decide
# everything.
DAMPING = 0.003
# Rows of a weight that are packed at once: what that takes is then small enough for memory to be used again.
ROWS_AT_ONCE = 256
# Tokens that pass an expert at once; many may be routed to a single one.
TOKENS_AT_ONCE = 1024


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
        return_freed_memory()
        rows = [routed(number) for number in range(first, last)]
        tuned, export = [r.tuned for r in rows], [r.export for r in rows]
        for name in PROJECTIONS:
            wanted, touched = _merged(experts, name, first, last, factors)
            values = _decoded(experts, name, first, last)
            if name == "gate_up_proj":
                passed = [_activated(experts, first + i, x, wanted[i]) for i, x in enumerate(tuned)]
            missing = [r.missing if name == "down_proj" else None for r in rows]
            found = touched.nonzero().flatten().tolist()
            parts = [
                _Part(tuned[i], export[i], wanted[i], values[i], rows[i].weight, missing[i]) for i in found
            ]
            if parts:
                values[found] = _fitted(parts, sweeps)
                changed += _store(experts, name, first, values)
            if name == "gate_up_proj":
                tuned = passed
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

    def lacking(self) -> Iterator[Tensor]:
        """What the outputs lack with the wanted weights, `[n, some of out]` after the other."""
        apart = self.tuned - self.export
        for first in range(0, len(self.wanted), OUTPUTS_AT_ONCE):
            outputs = slice(first, first + OUTPUTS_AT_ONCE)
            lack = apart @ self.wanted[outputs].mT
            yield lack if self.missing is None else lack.add_(self.missing[:, outputs])


def _fitted(parts: Sequence[_Part], sweeps: int) -> Tensor:
    """MXFP4 values `[g, out, in]`; what the parts want is changed on the way."""
    fits = [Ridge(part.export, part.weight, DAMPING) for part in parts]
    # The best unrounded weights: those wanted, and what mends the outputs.
    wanted = [part.wanted.add_(fit.solve(part.lacking())) for part, fit in zip(parts, fits, strict=True)]
    moments, was = [fit.moments for fit in fits], [part.was for part in parts]
    del fits  # and the inverses in them
    return requantise(_together(wanted), _together(moments), _together(was), sweeps=sweeps)


def _together(parts: Sequence[Tensor]) -> Tensor:
    """`[g, ...]`; a single large one is not copied."""
    return torch.stack(list(parts)) if len(parts) > 1 else parts[0].unsqueeze(0)


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

    def some(part: Tensor) -> Tensor:
        y = part @ weights.mT + experts.gate_up_proj_bias[number]
        return clamped_swiglu(y, experts.alpha, experts.limit)

    return torch.cat([some(part) for part in rows.split(TOKENS_AT_ONCE)])


def _store(experts: PackedExperts, name: str, first: int, values: Tensor) -> int:
    """Pack `values [g, out, in]`; a block whose values are as before keeps its bytes."""
    blocks, scales = experts.get_parameter(name), experts.get_parameter(f"{name}_scales")
    changed = 0
    for expert, wanted in enumerate(values, first):
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            stored = blocks[expert, rows], scales[expert, rows]
            differs = (dequantise_mxfp4(*stored, torch.float32) != wanted[rows]).unflatten(-1, (-1, BLOCK))
            moved, fresh = differs.any(-1), pack(wanted[rows])
            stored[0].copy_(torch.where(moved.unsqueeze(-1), fresh[0], stored[0]))
            stored[1].copy_(torch.where(moved, fresh[1], stored[1]))
            changed += int(differs.sum())
    return changed
