"""Attention of a merged layer, fitted so that it mends what rounded experts before it have put off.

The weights that an adapter changes are merged exactly, but they meet the export's inputs, which are a little
off. Query, key and value are fitted to give what the tuned model has from its own inputs, and then the output
projection to bring the residual stream to the tuned model's: least squares, drawn to the merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.export.layerwise import Layer
from finetune.export.ridge import OUTPUTS_AT_ONCE, Ridge
from finetune.export.streams import Streams

INWARD = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
OUTWARD = "self_attn.o_proj.weight"
# Share of the mean second moment that draws to the merged weights. On nano, from 0.003 to 0.03 the export is
# about as near to the tuned model; at 0.1 less is mended, and without it few tokens decide too much.
DAMPING = 0.01


def refit_attention(
    layer: Layer,
    exact: Mapping[str, Tensor],
    streams: Streams,
    attended: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """New values of those weights in `exact` that belong to attention, and the export's streams past it.

    `exact` holds a layer's merged weights by name, float32; the new ones are float32, rounded to `dtype`.
    `streams` are before the layer, `attended [T, H]` is the tuned one past its attention, and an error at
    token t counts `weight[t]`. The weights are put into `layer`.
    """
    found: dict[str, Tensor] = {}
    share = weight / weight.sum()
    inward = {name: exact[name] for name in INWARD if name in exact}
    if inward:
        changes = _inward_changes(layer, torch.cat(list(inward.values())), streams, share)
        parts = changes.split([len(weights) for weights in inward.values()])
        pairs = zip(inward.items(), parts, strict=True)
        found = {name: _rounded(weights + part, dtype) for (name, weights), part in pairs}
    layer.replace({**exact, **found})
    states, passages = streams.at["export"], streams.passages
    together = torch.cat(
        [layer.heads(state, passage) for state, passage in zip(states, passages, strict=True)]
    )
    heads = together.split([len(state) for state in states])
    if OUTWARD in exact:
        lacking = attended - torch.cat(layer.past_attention(states, heads))
        change = Ridge(together, share, DAMPING).solve(lacking.split(OUTPUTS_AT_ONCE, dim=1))
        found[OUTWARD] = _rounded(exact[OUTWARD] + change, dtype)
        layer.replace({OUTWARD: found[OUTWARD]})
    return found, layer.past_attention(states, heads)


def _inward_changes(layer: Layer, weights: Tensor, streams: Streams, share: Tensor) -> Tensor:
    """What `weights [out, H]` have to change by to give the tuned model's outputs for the export's inputs."""
    export = layer.before_attention(streams.all("export"))
    apart = layer.before_attention(streams.all("tuned")).sub_(export)
    lacking = (apart @ some.mT for some in weights.split(OUTPUTS_AT_ONCE))
    return Ridge(export, share, DAMPING).solve(lacking)


def _rounded(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.to(dtype).float()
