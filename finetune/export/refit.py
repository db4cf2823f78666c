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
) -> dict[str, Tensor]:
    """New values, in float32 but rounded to `dtype`, of those weights in `exact` that belong to attention.

    `exact` holds a layer's merged weights by name, float32. `streams` are before the layer, `attended [T, H]`
    is the tuned one past its attention, and an error at token t counts `weight[t]`. The weights are put into
    `layer`.
    """
    found: dict[str, Tensor] = {}
    tuned, export = (
        layer.before_attention(streams.all("tuned")),
        layer.before_attention(streams.all("export")),
    )
    for name in INWARD:
        if name in exact:
            lacking = (tuned - export) @ exact[name].mT
            found[name] = _rounded(exact[name] + _least_squares(export, lacking, weight), dtype)
    layer.replace({**exact, **found})
    if OUTWARD in exact:
        pairs = list(zip(streams.at["export"], streams.passages, strict=True))
        heads = torch.cat([layer.heads(state, passage) for state, passage in pairs])
        lacking = attended - torch.cat(streams.attended(layer, "export"))
        found[OUTWARD] = _rounded(exact[OUTWARD] + _least_squares(heads, lacking, weight), dtype)
        layer.replace({OUTWARD: found[OUTWARD]})
    return found


def _least_squares(inputs: Tensor, lacking: Tensor, weight: Tensor) -> Tensor:
    """The change `[out, in]` of a map that gives `lacking [T, out]` from `inputs [T, in]`."""
    weighted = (inputs * weight.unsqueeze(1)).mT
    moments = weighted @ inputs
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    change: Tensor = torch.cholesky_solve(weighted @ lacking, torch.linalg.cholesky(moments)).mT
    return change


def _rounded(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.to(dtype).float()
