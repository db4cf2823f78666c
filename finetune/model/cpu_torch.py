"""A group's products and activation by torch's operations: weights are decoded, then oneDNN multiplies.

In float32 oneDNN keeps all digits (`finetune.model.cpu_settings`). It compiles and keeps a program for each
number of rows it meets; an expert's rows are therefore padded to one of few lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.model.cpu_rows import Group, Limit, Pass, Projection, wide_of

# Rows of one expert are a power of two or a multiple of this: at 2048 tokens a step over 32
# experts padding then adds 6% to the products and leaves some ten lengths.
ROWS = 32


class Slice(NamedTuple):
    """Some output features of an expert: `weights [features, in]`."""

    expert: int
    rows: slice
    features: slice
    weights: Tensor


@dataclass
class TorchArithmetic:
    """Consecutive experts are decoded together, a large one in slices that are still in the processor's
    cache when they are multiplied."""

    run: Pass
    # Of each projection the group that was decoded last, and its weights: a backward needs some twice.
    decoded: dict[str, tuple[Group, Sequence[Tensor]]] = field(default_factory=dict)

    @staticmethod
    def padded(rows: int, dtype: torch.dtype) -> int:
        if dtype == torch.float64:
            return rows
        return -(-rows // ROWS) * ROWS if rows > ROWS else 1 << (rows - 1).bit_length()

    def limit(self) -> Limit:
        return Limit(self.run.experts.group_size(), len(self.run.order.token), consecutive=True)

    def _slices(self, name: str, group: Group) -> Iterator[Slice]:
        experts = self.run.experts
        out, at_once = experts.features(name)[1], experts.features_at_once(name)
        whole = self._whole(name, group) if at_once == out else None
        for number, (expert, rows) in enumerate(group.parts):
            for start in range(0, out, at_once):
                features = slice(start, min(start + at_once, out))
                weights = whole[number] if whole else self._decode(name, group, features)[0]
                yield Slice(expert, rows, features, weights)

    def _whole(self, name: str, group: Group) -> Sequence[Tensor]:
        if name not in self.decoded or self.decoded[name][0] is not group:
            every = slice(0, self.run.experts.features(name)[1])
            self.decoded[name] = group, self._decode(name, group, every)
        return self.decoded[name][1]

    def _decode(self, name: str, group: Group, features: slice) -> Sequence[Tensor]:
        first, last = group.parts[0].expert, group.parts[-1].expert + 1
        return self.run.experts.weights(name, first, last, self.run.x.dtype, features)

    def apply(
        self, projection: Projection, group: Group, rows: Tensor, low: Tensor | None, into: str
    ) -> Tensor:
        """`rows [n, in]`, and after LoRA's first factor `low [n, R]` -> `[n, out]`."""
        name, experts = projection.name, self.run.experts
        out = self.run.take(into, group, experts.features(name)[1])
        for expert, part, features, weights in self._slices(name, group):
            bias = experts.bias(name)[expert, features].to(rows.dtype)
            torch.addmm(bias, rows[part], weights.t(), out=out[part, features])
        if projection.factors and low is not None:
            for expert, part in group.parts:
                out[part].addmm_(low[part], projection.factors.b[expert].t())
        return out

    def pull_back(
        self, projection: Projection, group: Group, d_out: Tensor, d_low: Tensor | None, into: str, spare: str
    ) -> Tensor:
        """`d_out [n, out]`, and the gradient of `low` -> that of the rows, `[n, in]` in at least float32.

        Each product comes by way of the scratch memory `spare`.
        """
        inputs = self.run.experts.features(projection.name)[0]
        product = self.run.take(spare, group, inputs)
        d_rows = self.run.take(into, group, inputs, wide_of(d_out.dtype))
        for expert, part, features, weights in self._slices(projection.name, group):
            torch.mm(d_out[part, features], weights, out=product[part])
            if projection.factors and d_low is not None and features.start == 0:
                product[part].addmm_(d_low[part], projection.factors.a[expert])
            if features.start == 0:
                d_rows[part] = product[part]
            else:
                d_rows[part].add_(product[part])
        return d_rows

    def lower(self, group: Group, rows: Tensor, factor: Tensor, into: str) -> Tensor:
        """`rows [n, M]`, `factor [E, R, M]` -> `[n, R]`: each row by its expert's."""
        low = self.run.take(into, group, factor.shape[1])
        for expert, part in group.parts:
            torch.mm(rows[part], factor[expert].t(), out=low[part])
        return low

    def sum_up(self, group: Group, low: Tensor, rows: Tensor, out: Tensor) -> None:
        """`low [n, R]`, `rows [n, M]` -> of each expert `low.T @ rows`, in its place of `out [E, R, M]`."""
        for expert, part in group.parts:
            out[expert] = low[part].t() @ rows[part]

    def activation(self, group: Group, y: Tensor) -> TorchActivation:
        return TorchActivation(self.run, group, y)


class TorchActivation:
    """`h = (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate))` of some rows, and its gradient.

    `silu(z) = z * sigmoid(z)`, so with z = alpha * clamp(gate) it is (clamp(up) + 1) * silu(z) / alpha.
    """

    def __init__(self, run: Pass, group: Group, y: Tensor) -> None:
        """`y [n, 2I]`, gate and up interleaved."""
        self.run, self.group, self.y = run, group, y
        self.alpha, self.limit = run.experts.alpha, run.experts.limit
        self.gate, self.up = self._take("gate").copy_(y[:, 0::2]), self._take("up").copy_(y[:, 1::2])
        self.z = torch.clamp(self.gate, max=self.limit, out=self._take("z")).mul_(self.alpha)
        self.linear = torch.clamp(self.up, -self.limit, self.limit, out=self._take("linear")).add_(1)
        self.silu = torch.ops.aten.silu.out(self.z, out=self._take("silu")).div_(self.alpha)

    def _take(self, purpose: str) -> Tensor:
        return self.run.take(purpose, self.group, self.y.shape[1] // 2, wide_of(self.y.dtype))

    def hidden(self) -> Tensor:
        """`h [n, I]`, in y's dtype."""
        hidden = torch.mul(self.linear, self.silu, out=self._take("hidden, wide"))
        if hidden.dtype == self.y.dtype:
            return hidden
        return self.run.take("hidden", self.group, hidden.shape[1]).copy_(hidden)

    def pull_back(self, d_hidden: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """`d_hidden [n, I]` of the unweighted output, `score [n, 1]` -> the gradient of y, in y's place, and
        `<d_hidden, h> [n, 1]`. Where a clamp holds the gradient is zero."""
        d_score = (
            torch.mul(self.linear, self.silu, out=self._take("hidden, wide")).mul_(d_hidden).sum(1, True)
        )
        d_hidden = d_hidden.mul_(score)
        d_up = self.silu.mul_(d_hidden)
        d_silu = self.linear.mul_(d_hidden)
        d_gate = torch.ops.aten.silu_backward.grad_input(d_silu, self.z, grad_input=self.z)
        clamped, limit = torch.ops.aten.hardtanh_backward.grad_input, self._just_over_the_limit()
        self.y[:, 0::2] = clamped(d_gate, self.gate, -torch.inf, limit, grad_input=d_gate)
        self.y[:, 1::2] = clamped(d_up, self.up, -limit, limit, grad_input=d_up)
        return self.y, d_score

    def _just_over_the_limit(self) -> float:
        """hardtanh's gradient is zero at its bounds, that of a clamp only beyond them."""
        limit = torch.tensor(self.limit, dtype=self.gate.dtype)
        return torch.nextafter(limit, torch.full_like(limit, torch.inf)).item()
