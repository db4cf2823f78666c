"""One layer of a merge: attention and experts fitted to the streams that pass through it.

The tuned model and the export run side by side, and the base for what the adapter changes. Every part of the
export gets the export's own inputs and is fitted to the tuned model's outputs, so that each mends what it can
of all that rounding put off before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.export.calibrate import Rows, fit
from finetune.export.layerwise import Layer, Network
from finetune.export.refit import refit_attention
from finetune.export.shortfall import Shortfall
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
# all over. The last layer is fitted up to so often, each time aiming further beyond the tuned model, as long
# as more than a thousandth is missing.
ROUNDS, ENOUGH = 4, 1e-3
# On nano a quarter to a half of what is aimed further arrives; less would be chance. And an aim beyond the
# bound would mean that the export cannot be had.
LEAST_RESPONSE, LARGEST_EXCESS = 0.25, 0.3


class FittedLayer(NamedTuple):
    """What is to be written: experts that are packed again, dense weights by name, and how much changed."""

    layer: Layer
    dense: dict[str, Tensor]
    changed: int


class Change(NamedTuple):
    """An adapter's change of a layer: merged dense weights by name, float32, and the experts' factors.

    `exact` is emptied when it has been used.
    """

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
    dense, export = refit_attention(layer, change.exact, before, tuned, weight, dtype)
    dense |= {name: exact.to(dtype).float() for name, exact in change.exact.items() if name not in dense}
    past_attention = torch.cat(export)
    change.exact.clear()  # with the streams 0.5 GB of gpt-oss-20b, of no more use
    del before, attended, export
    layer.replace(dense)
    network.release_scratch()
    experts = _Experts(layer, change.factors, calibration, tuned, past_attention, weight, sweeps)
    last = number == network.config.num_hidden_layers - 1
    changed = _fit_last(network, number, experts) if last and change.factors else experts.fit()
    walk.held_out.step(layer, "export", {})
    return FittedLayer(layer, dense, changed)


def _token_weights(streams: Streams) -> Tensor:
    """How much an error counts at each token, `[T]`."""
    change = (streams.all("tuned") - streams.all("base")).square().mean(1)
    relative = (change / change.mean().clamp(min=1e-30)).clamp(LEAST_CHANGE, MOST_CHANGE)
    learned = streams.learned().to(relative.device)
    return torch.where(learned, 1.0, WEIGHT_NOT_LEARNED) * relative**POWER_OF_CHANGE


@dataclass(frozen=True)
class _Experts:
    """A layer's experts and what they are fitted by; tuned model and export past attention are `[T, H]`."""

    layer: Layer
    factors: Mapping[str, Factors]
    streams: Streams
    tuned: Tensor
    export: Tensor
    weight: Tensor  # [T]: how much an error counts
    sweeps: int

    def fit(self, excess: float = 0.0) -> int:
        """Fit them, and have the export's streams pass the layer; returns how many packed values changed.

        `excess` is the share of the tuned model's change by which to aim beyond it.
        """
        layer, streams, changed = self.layer, self.streams, 0
        if self.factors:
            indices, scores = layer.route(layer.normed(self.export))
            beyond = excess * (streams.all("tuned") - streams.all("base")) if excess else None

            def routed(expert: int) -> Rows:
                token, place = torch.where(indices == expert)
                # The layer's output is off by score times the expert's error.
                counts = self.weight[token] * scores[token, place].square()
                share = counts / counts.sum().clamp(min=1e-30)
                tuned, export = self.tuned[token], self.export[token]
                missing = tuned - export
                if beyond is not None:
                    missing += beyond[token]
                return Rows(layer.normed(tuned), layer.normed(export), missing, share)

            changed = fit(layer.experts, self.factors, routed, sweeps=self.sweeps)
        lengths = [len(passage.ids) for passage in streams.passages]
        streams.finish(layer, "export", self.export.split(lengths), {})
        return changed


def _fit_last(network: Network, number: int, experts: _Experts) -> int:
    """Fit the last layer's experts until little of what was learned is missing; else as `_Experts.fit`."""
    shortfall = Shortfall(network, experts.streams, experts.weight)
    changed, excess = experts.fit(), 0.0
    tried = [(excess, shortfall.missing())]
    while len(tried) < ROUNDS and abs(tried[-1][1]) > ENOUGH:
        before, excess = excess, next_excess(tried)
        if excess == before:
            break
        network.restore_experts(experts.layer, number)
        changed = experts.fit(excess)
        tried.append((excess, shortfall.missing()))
    return changed


def next_excess(tried: Sequence[tuple[float, float]]) -> float:
    """The excess at which nothing should be missing, by `tried`: pairs of an excess and what was missing."""
    excess, missing = tried[-1]
    response = 1.0
    if len(tried) > 1:
        before, missing_before = tried[-2]
        response = (missing_before - missing) / (excess - before)
    wanted = excess + missing / min(max(response, LEAST_RESPONSE), 1.0)
    return min(max(wanted, 0.0), LARGEST_EXCESS)
