"""The steps between the products of the expert layer: what they are, in plain torch, and in Triton."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from finetune.model.mxfp4 import dequantise_mxfp4


class Steps(Protocol):
    """Rows may lie in wider ones; lengths of rows are multiples of 8."""

    def decode(self, blocks: Tensor, scales: Tensor, out: Tensor) -> None:
        """`blocks [g, rows, in/32, 16]`, `scales [g, rows, in/32]` into `out[..., :in]`, `[g, rows, W]`."""

    def gather(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        """`out [n, M] = x[index]`, `x [T, M]`, `index [n]`."""

    def combine(self, rows: Tensor, place: Tensor, top: int, scores: Tensor | None) -> Tensor:
        """Each token's `top` rows of `rows [N, M]`, at `place [N]`, times `scores [T, top]` -> `[T, M]`."""

    def row_dots(self, left: Tensor, right: Tensor) -> Tensor:
        """`[n, M]` and `[n, M]` -> `[n]`, in at least float32."""

    def swiglu(self, y: Tensor, hidden: Tensor, alpha: float, limit: float) -> None:
        """`y [n, 2I]`, gate and up interleaved, into `hidden [n, I]`."""

    def swiglu_gradient(
        self, y: Tensor, d_hidden: Tensor, further: Tensor | None, score: Tensor, alpha: float, limit: float
    ) -> Tensor:
        """Gradient of `y [n, 2I]`, which may be overwritten, from `score [n] * d_hidden [n, I] + further`."""


class TorchSteps:
    """The reference: any device, any floating dtype."""

    def decode(self, blocks: Tensor, scales: Tensor, out: Tensor) -> None:
        weights = dequantise_mxfp4(blocks, scales, out.dtype)
        out[..., : weights.shape[-1]] = weights

    def gather(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        out.copy_(x[index])

    def combine(self, rows: Tensor, place: Tensor, top: int, scores: Tensor | None) -> Tensor:
        by_token = _wide(rows[place]).unflatten(0, (-1, top))
        if scores is not None:
            by_token = by_token * scores.unsqueeze(-1)
        total: Tensor = by_token.sum(1)
        return total.to(rows.dtype)

    def row_dots(self, left: Tensor, right: Tensor) -> Tensor:
        return (_wide(left) * _wide(right)).sum(1)

    def swiglu(self, y: Tensor, hidden: Tensor, alpha: float, limit: float) -> None:
        gate = _wide(y[:, 0::2]).clamp(max=limit)
        up = _wide(y[:, 1::2]).clamp(-limit, limit)
        hidden.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))

    def swiglu_gradient(
        self, y: Tensor, d_hidden: Tensor, further: Tensor | None, score: Tensor, alpha: float, limit: float
    ) -> Tensor:
        raw_gate, raw_up = _wide(y[:, 0::2]), _wide(y[:, 1::2])
        gate, up = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * gate)
        d = _wide(d_hidden) * score.unsqueeze(1)
        if further is not None:
            d = d + further
        d_gate = d * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * (raw_gate <= limit)
        d_up = d * gate * sigmoid * (raw_up.abs() <= limit)
        return torch.stack([d_gate, d_up], dim=-1).flatten(1).to(y.dtype)


class TritonSteps:
    """On a GPU, or under Triton's interpreter."""

    def decode(self, blocks: Tensor, scales: Tensor, out: Tensor) -> None:
        from finetune.model.kernels.decode import decode

        decode(blocks, scales, out)

    def gather(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        from finetune.model.kernels.rows import gather

        gather(x.contiguous(), index, out)

    def combine(self, rows: Tensor, place: Tensor, top: int, scores: Tensor | None) -> Tensor:
        from finetune.model.kernels.rows import combine

        out = rows.new_empty(place.numel() // top, rows.shape[1])
        combine(rows, place, top, None if scores is None else scores.contiguous(), out)
        return out

    def row_dots(self, left: Tensor, right: Tensor) -> Tensor:
        from finetune.model.kernels.rows import row_dots

        out = left.new_empty(left.shape[0], dtype=torch.float32)
        row_dots(left, right, out)
        return out

    def swiglu(self, y: Tensor, hidden: Tensor, alpha: float, limit: float) -> None:
        from finetune.model.kernels.swiglu import swiglu

        swiglu(y, hidden, alpha, limit)

    def swiglu_gradient(
        self, y: Tensor, d_hidden: Tensor, further: Tensor | None, score: Tensor, alpha: float, limit: float
    ) -> Tensor:
        from finetune.model.kernels.swiglu import swiglu_gradient

        return swiglu_gradient(y, d_hidden, further, score, alpha, limit)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def steps_for(device: torch.device, dtype: torch.dtype) -> Steps:
    """Triton's on a GPU, whose kernels compute in float32; plain torch elsewhere and in float64."""
    return TritonSteps() if device.type == "cuda" and dtype != torch.float64 else TorchSteps()
