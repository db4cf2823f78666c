"""The expert layer on a CPU: a group of experts' rows at a time, in memory that is used again and again."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from finetune.model.cpu_native import NativeArithmetic
from finetune.model.cpu_rows import Group, Limit, Order, Pass, Projection, wide_of
from finetune.model.cpu_torch import TorchArithmetic
from finetune.model.expert_layer import Factors, FrozenExperts, Gradients, Routing
from finetune.model.native.products import native_products


class Activation(Protocol):
    """Between the projections of some rows."""

    def hidden(self) -> Tensor: ...
    def pull_back(self, d_hidden: Tensor, score: Tensor) -> tuple[Tensor, Tensor]: ...


class Arithmetic(Protocol):
    """The products and the activation of a group's rows."""

    @staticmethod
    def padded(rows: int, dtype: torch.dtype) -> int: ...
    def limit(self) -> Limit: ...
    def apply(
        self, projection: Projection, group: Group, rows: Tensor, low: Tensor | None, into: str
    ) -> Tensor: ...
    def pull_back(
        self, projection: Projection, group: Group, d_out: Tensor, d_low: Tensor | None, into: str, spare: str
    ) -> Tensor: ...
    def lower(self, group: Group, rows: Tensor, factor: Tensor, into: str) -> Tensor: ...
    def sum_up(self, group: Group, low: Tensor, rows: Tensor, out: Tensor) -> None: ...
    def activation(self, group: Group, y: Tensor) -> Activation: ...


def _begin(experts: FrozenExperts, x: Tensor, routing: Routing, scores: Tensor) -> tuple[Pass, Arithmetic]:
    """`x [T, H]`, `scores [T, k]`."""
    native = native_products(x.dtype) if experts.packed("gate_up_proj") else None
    padded = NativeArithmetic.padded if native else TorchArithmetic.padded
    run = Pass(experts, x, Order(routing, scores, x.dtype, lambda rows: padded(rows, x.dtype)))
    return run, NativeArithmetic(run, native) if native else TorchArithmetic(run)


class FactorGradients:
    """Gradients of one projection's factors: `a [E, R, in]`, and transposed, `b [E, R, out]`."""

    def __init__(self, arithmetic: Arithmetic, factors: Factors) -> None:
        self.arithmetic = arithmetic
        self.a, self.b = (
            torch.zeros_like(factor, dtype=wide_of(factor.dtype), memory_format=torch.contiguous_format)
            for factor in (factors.a, factors.b.transpose(1, 2))
        )

    def add(self, group: Group, rows: Tensor, low: Tensor, d_low: Tensor, d_out: Tensor) -> None:
        """`rows [n, in]`, `low` and `d_low [n, R]`, `d_out [n, out]`."""
        self.arithmetic.sum_up(group, d_low, rows, self.a)
        self.arithmetic.sum_up(group, low, d_out, self.b)

    def result(self, given: Factors) -> Factors:
        """As gradients of the factors that were given."""
        return given.gradients(Factors(self.a, self.b.transpose(1, 2)))


class CpuProducts:
    """The back end of CPUs."""

    def forward(
        self, x: Tensor, scores: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Tensor:  # fmt: skip
        """`x [T, H]`, `scores [T, k]` -> `[T, H]`."""
        ready = experts.scratch.kept.ready if experts.scratch.kept else Factors.ready
        run, arithmetic = _begin(experts, x, routing, scores)
        first = Projection("gate_up_proj", up and ready(up, x.dtype))
        second = Projection("down_proj", down and ready(down, x.dtype))
        out = x.new_zeros(x.shape, dtype=wide_of(x.dtype))
        for group in run.order.groups(arithmetic.limit()):
            rows = run.rows("x", group, x)
            low = arithmetic.lower(group, rows, first.a, into="low") if first.a is not None else None
            y = arithmetic.apply(first, group, rows, low, into="y")
            hidden = arithmetic.activation(group, y).hidden()
            low = arithmetic.lower(group, hidden, second.a, into="low") if second.a is not None else None
            # The rows of x are done with, and as wide as those of the output.
            y = run.wide("x, wide", group, arithmetic.apply(second, group, hidden, low, into="x"))
            out.index_add_(0, run.order.token[group.rows], y.mul_(run.order.score[group.rows]))
        return out.to(x.dtype)

    def backward(
        self, x: Tensor, scores: Tensor, d_out: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Gradients:  # fmt: skip
        """`d_out [T, H]` -> the gradients of x, the scores and the factors."""
        run, arithmetic = _begin(experts, x, routing, scores)
        way_back = _Backward(run, arithmetic, d_out, up and up.ready(x.dtype), down and down.ready(x.dtype))
        d_x = x.new_zeros(x.shape, dtype=wide_of(x.dtype))
        d_score = torch.zeros_like(run.order.score)  # [rows, 1]
        for group in run.order.groups(arithmetic.limit()):
            d_score[group.rows] = way_back.add(group, d_x)
        d_scores = d_score[run.order.place, 0][routing.inverse].view(scores.shape).to(scores.dtype)
        d_up = way_back.up_gradients.result(up) if up and way_back.up_gradients else None
        d_down = way_back.down_gradients.result(down) if down and way_back.down_gradients else None
        return Gradients(d_x.to(x.dtype), d_scores, d_up, d_down)


class _Backward:
    def __init__(
        self, run: Pass, arithmetic: Arithmetic, d_out: Tensor, up: Factors | None, down: Factors | None
    ) -> None:
        """`d_out [T, H]`; factors as the products want them."""
        self.run, self.d_out, self.arithmetic = run, d_out, arithmetic
        self.up, self.down = Projection("gate_up_proj", up), Projection("down_proj", down)
        self.up_gradients = FactorGradients(arithmetic, up) if up else None
        self.down_gradients = FactorGradients(arithmetic, down) if down else None
        self.bias = run.experts.bias("down_proj").detach().to(d_out.dtype).unsqueeze(1)  # [E, 1, H]

    def _lower(self, group: Group, rows: Tensor, factor: Tensor | None, into: str) -> Tensor | None:
        return None if factor is None else self.arithmetic.lower(group, rows, factor, into)

    def add(self, group: Group, d_x: Tensor) -> Tensor:
        """Add a group's gradients, to `d_x [T, H]` among others; returns those of its scores, `[n, 1]`."""
        run, order, arithmetic = self.run, self.run.order, self.arithmetic
        score = order.score[group.rows]
        x, d_out = run.rows("x", group, run.x), run.rows("d_out", group, self.d_out)
        low = self._lower(group, x, self.up.a, into="low")
        activation = arithmetic.activation(group, arithmetic.apply(self.up, group, x, low, into="y"))
        run.experts.note_gradient(order.expert[group.rows], d_out, score[:, 0])
        d_y, d_score = self._down(group, activation, d_out, score)
        d_low = self._lower(group, d_y, self.up.b, into="d_low")
        # The rows of d_out are done with, and as wide as those of x.
        d_rows = arithmetic.pull_back(self.up, group, d_y, d_low, into="x, wide", spare="d_out")
        if self.up_gradients and low is not None and d_low is not None:
            self.up_gradients.add(group, x, low, d_low, d_y)
        d_x.index_add_(0, order.token[group.rows], d_rows)
        return d_score

    def _down(
        self, group: Group, activation: Activation, d_out: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`d_out [n, H]` of the weighted output -> gradients of the activation's input and of the scores.

        The output itself is not needed for the latter: <d_out, W h + B A h + b> = <d_hidden, h> + <d_out, b>,
        with d_hidden of the unweighted output.
        """
        d_low = self._lower(group, d_out, self.down.b, into="d_low")
        d_hidden = self.arithmetic.pull_back(self.down, group, d_out, d_low, into="d_hidden", spare="hidden")
        if self.down_gradients and d_low is not None and self.down.a is not None:
            hidden = activation.hidden()
            low = self.arithmetic.lower(group, hidden, self.down.a, into="low, down")
            # The score weights the narrow tensors, which is the same and less work.
            self.down_gradients.add(group, hidden, low.mul_(score), d_low.mul_(score), d_out)
        d_y, d_score = activation.pull_back(d_hidden, score)
        d_score += self.arithmetic.lower(group, d_out, self.bias, into="d_out, bias")
        return d_y, d_score
