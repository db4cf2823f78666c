"""One layer of a merge: attention and experts fitted to the streams that pass through it.

The tuned model and the export run side by side, and the base for what the adapter changes. Every part of the
export gets the export's own inputs and is fitted to the tuned model's outputs, so that each mends what it can
of all that rounding put off before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.export.calibrate import Rows, fit
from finetune.export.layerwise import Layer, Network
from finetune.export.refit import refit_attention
from finetune.export.streams import Streams, Walk
from finetune.model.expert_layer import Factors

# What an error counts at a token whose successor is not learned; those matter through attention alone.
WEIGHT_NOT_LEARNED = 0.2
# Tokens that the adapter changes more count more, by this power of the square of the change. On nano, higher
# powers keep more of the gain but let the export stray elsewhere: at 0.5 it diverged four times as far.
POWER_OF_CHANGE = 0.2
# Of the changes relative to their mean; beyond these, single tokens would decide.
LEAST_CHANGE, MOST_CHANGE = 1e-3, 1e2
# Where a change is small rounding falls back on the base's own values, so an export has learned a little less
# all over. The last layer is fitted so often, each time aiming further by the share that was missing.
ROUNDS = 4


class FittedLayer(NamedTuple):
    """What is to be written: experts that are packed again, dense weights by name, and how much changed."""

    layer: Layer
    dense: dict[str, Tensor]
    changed: int


class Change(NamedTuple):
    """An adapter's change of a layer: merged dense weights by name, float32, and the experts' factors."""

    exact: dict[str, Tensor]
    factors: dict[str, Factors]


def fit_layer(network: Network, number: int, change: Change, walk: Walk, *, sweeps: int) -> FittedLayer:
    """Fit layer `number` to the calibration streams; all streams of `walk` then stand past it."""
    layer, calibration = network.layer(number), walk.calibration
    for streams in walk:
        streams.step(layer, "base", {})
    layer.replace(change.exact)
    before = Streams(calibration.passages, dict(calibration.at))
    attended = calibration.attended(layer, "tuned")
    calibration.finish(layer, "tuned", attended, change.factors)
    walk.held_out.step(layer, "tuned", change.factors)
    network.release_scratch()
    weight = _token_weights(calibration)
    tuned = torch.cat(attended)
    dtype = network.dense_dtype
    dense = {name: merged.to(dtype).float() for name, merged in change.exact.items()}
    refitted, export = refit_attention(layer, change.exact, before, tuned, weight, dtype)
    dense |= refitted
    del before, attended  # 0.4 GB of gpt-oss-20b's streams, of no more use
    layer.replace(dense)
    network.release_scratch()
    last = number == network.config.num_hidden_layers - 1
    excess, changed = 0.0, 0
    for round_number in range(ROUNDS if last and change.factors else 1):
        if round_number:
            network.restore_experts(layer, number)
        past_attention = torch.cat(export)
        missing = tuned - past_attention
        if excess:
            missing += excess * (calibration.all("tuned") - calibration.all("base"))
        changed = _fit_experts(layer, change.factors, tuned, past_attention, missing, weight, sweeps)
        calibration.finish(layer, "export", export, {})
        excess += 1 - _share_of_change(calibration, weight)
    walk.held_out.step(layer, "export", {})
    return FittedLayer(layer, dense, changed)


def _token_weights(streams: Streams) -> Tensor:
    """How much an error counts at each token, `[T]`."""
    change = (streams.all("tuned") - streams.all("base")).square().mean(1)
    relative = (change / change.mean().clamp(min=1e-30)).clamp(LEAST_CHANGE, MOST_CHANGE)
    learned = streams.learned().to(relative.device)
    return torch.where(learned, 1.0, WEIGHT_NOT_LEARNED) * relative**POWER_OF_CHANGE


def _share_of_change(streams: Streams, weight: Tensor) -> float:
    """How much of the tuned model's change the export makes: the slope of one's change on the other's."""
    base = streams.all("base")
    wanted, made = streams.all("tuned") - base, streams.all("export") - base
    return float((weight @ (wanted * made)).sum() / (weight @ wanted.square()).sum().clamp(min=1e-30))


def _fit_experts(
    layer: Layer, factors: Mapping[str, Factors], tuned: Tensor, export: Tensor,
    missing: Tensor, weight: Tensor, sweeps: int,
) -> int:  # fmt: skip
    """Fit the layer's experts to streams past attention, `[T, H]`; returns how many packed values changed."""
    if not factors:
        return 0
    indices, scores = layer.route(layer.normed(export))

    def routed(expert: int) -> Rows:
        token, place = torch.where(indices == expert)
        # The layer's output is off by score times the expert's error.
        counts = weight[token] * scores[token, place].square()
        share = counts / counts.sum().clamp(min=1e-30)
        return Rows(layer.normed(tuned[token]), layer.normed(export[token]), missing[token], share)

    return fit(layer.experts, factors, routed, sweeps=sweeps)
