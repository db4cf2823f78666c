"""The expert layer's products on a CPU: one expert's rows at a time, in memory that is used again and again.

Fresh memory costs more here than the arithmetic of small operations (every page of it is cleared by the
system first), so whatever has as many rows as were routed to an expert lives in scratch memory, and what
an expert's rows give is added to their tokens at once, experts in order: nothing as long as all rows is kept,
and sums repeat bit for bit.

Products are oneDNN's (in float32, where it keeps all digits), which compiles and keeps a program for each
number of rows it meets. An expert's rows are therefore padded with rows of weight zero to one of few lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.model.expert_layer import Factors, FrozenExperts, Gradients, Routing

# Rows of one expert are a power of two or a multiple of this: at 2048 tokens a step over 32
# experts padding then adds 6% to the products and leaves some ten lengths.
ROWS = 32


def _padded(rows: int, dtype: torch.dtype) -> int:
    if dtype == torch.float64:
        return rows
    return -(-rows // ROWS) * ROWS if rows > ROWS else 1 << (rows - 1).bit_length()


class Part(NamedTuple):
    """An expert and where its rows are in its group's buffers."""

    expert: int
    rows: slice


class Group(NamedTuple):
    """Consecutive experts that all have rows, and where their rows are among all padded ones."""

    parts: list[Part]
    rows: slice

    @property
    def experts(self) -> slice:
        return slice(self.parts[0].expert, self.parts[-1].expert + 1)


class Order:
    """Rows sorted by expert, each expert's padded."""

    def __init__(self, routing: Routing, scores: Tensor, dtype: torch.dtype) -> None:
        """`scores [T, k]`; `dtype` is that of the products."""
        ends = routing.host_ends
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.lengths = [_padded(count, dtype) if count else 0 for count in counts]
        padding = torch.tensor([0, *self.lengths]).cumsum(0)[:-1] - torch.tensor([0, *ends[:-1]])
        # Of each sorted row its place among the padded ones, [N].
        self.place = torch.arange(len(routing.order)) + padding[routing.expert]
        rows = sum(self.lengths)
        self.token = routing.token.new_zeros(rows).index_copy_(0, self.place, routing.token)
        self.expert = routing.expert.new_zeros(rows).index_copy_(0, self.place, routing.expert)
        score = scores.reshape(-1)[routing.order].to(wide_of(dtype))
        self.score = score.new_zeros(rows).index_copy_(0, self.place, score).unsqueeze(1)  # [rows, 1]

    def groups(self, size: int) -> Iterator[Group]:
        """Groups of up to `size` experts; those without a row are passed over."""
        parts: list[Part] = []
        start = end = 0
        for expert, length in enumerate(self.lengths):
            if parts and (not length or len(parts) == size):
                yield Group(parts, slice(start, end))
                parts, start = [], end
            if length:
                parts.append(Part(expert, slice(end - start, end - start + length)))
                end += length
        if parts:
            yield Group(parts, slice(start, end))


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What sums, and the activation between the projections, are computed in."""
    return torch.promote_types(dtype, torch.float32)


class Slice(NamedTuple):
    """Some output features of an expert: `weights [features, in]`."""

    expert: int
    rows: slice
    features: slice
    weights: Tensor


class Projection:
    """One projection of a group: of each expert the frozen weights `[out, in]`, bias and LoRA."""

    def __init__(
        self, group: Group, experts: FrozenExperts, name: str, factors: Factors | None, dtype: torch.dtype
    ) -> None:
        self.group, self.experts, self.name, self.factors, self.dtype = group, experts, name, factors, dtype
        self.out = experts.features(name)[1]
        self.at_once = experts.features_at_once(name)
        self.weights = self._decode(slice(0, self.out)) if self.at_once == self.out else None

    def _decode(self, features: slice) -> Sequence[Tensor]:
        first, last = self.group.experts.start, self.group.experts.stop
        return self.experts.weights(self.name, first, last, self.dtype, features)

    def _slices(self) -> Iterator[Slice]:
        """A large expert comes in slices that are still in the processor's cache when they are multiplied."""
        for number, (expert, rows) in enumerate(self.group.parts):
            for start in range(0, self.out, self.at_once):
                features = slice(start, min(start + self.at_once, self.out))
                weights = self.weights[number] if self.weights else self._decode(features)[0]
                yield Slice(expert, rows, features, weights)

    def apply(self, rows: Tensor, out: Tensor, low: Tensor | None) -> Tensor:
        """`rows [n, in]` -> `out [n, out]`; what they are after LoRA's first factor goes to `low [n, R]`."""
        for expert, part, features, weights in self._slices():
            bias = self.experts.bias(self.name)[expert, features].to(self.dtype)
            torch.addmm(bias, rows[part], weights.t(), out=out[part, features])
        if self.factors and low is not None:
            for expert, part in self.group.parts:
                torch.mm(rows[part], self.factors.a[expert].t(), out=low[part])
                out[part].addmm_(low[part], self.factors.b[expert].t())
        return out

    def pull_back(self, d_out: Tensor, d_rows: Tensor, d_low: Tensor | None, product: Tensor) -> Tensor:
        """`d_out [n, out]` -> `d_rows [n, in]`, in at least float32, by way of `product [n, in]`.

        The gradient of what `apply` put in `low` goes to `d_low`.
        """
        for expert, part, features, weights in self._slices():
            torch.mm(d_out[part, features], weights, out=product[part])
            if self.factors and d_low is not None and features.start == 0:
                torch.mm(d_out[part], self.factors.b[expert], out=d_low[part])
                product[part].addmm_(d_low[part], self.factors.a[expert])
            if features.start == 0:
                d_rows[part] = product[part]
            else:
                d_rows[part].add_(product[part])
        return d_rows


class FactorGradients:
    """Gradients of one projection's factors: `a [E, R, in]`, and transposed, `b [E, R, out]`."""

    def __init__(self, factors: Factors) -> None:
        self.a = torch.zeros_like(factors.a)
        self.b = factors.b.new_zeros(factors.b.transpose(1, 2).shape)

    def add(self, group: Group, rows: Tensor, low: Tensor, d_low: Tensor, d_out: Tensor) -> None:
        """`rows [n, in]`, `low` and `d_low [n, R]`, `d_out [n, out]`."""
        for expert, part in group.parts:
            torch.mm(d_low[part].t(), rows[part], out=self.a[expert])
            torch.mm(low[part].t(), d_out[part], out=self.b[expert])

    def result(self, given: Factors) -> Factors:
        """As gradients of the factors that were given."""
        return given.gradients(Factors(self.a, self.b.transpose(1, 2)))


class Activation:
    """`h = (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate))` of some rows, and its gradient.

    `silu(z) = z * sigmoid(z)`, so with z = alpha * clamp(gate) it is (clamp(up) + 1) * silu(z) / alpha.
    """

    def __init__(self, y: Tensor, experts: FrozenExperts) -> None:
        """`y [n, 2I]`, gate and up interleaved."""
        self.y, self.alpha, self.limit = y, experts.alpha, experts.limit
        self.scratch, self.wide = experts.scratch, wide_of(y.dtype)
        self.gate, self.up = self.take("gate").copy_(y[:, 0::2]), self.take("up").copy_(y[:, 1::2])
        self.z = torch.clamp(self.gate, max=self.limit, out=self.take("z")).mul_(self.alpha)
        self.linear = torch.clamp(self.up, -self.limit, self.limit, out=self.take("linear"))
        self.silu = torch.ops.aten.silu.out(self.z, out=self.take("silu")).div_(self.alpha)

    def take(self, purpose: str) -> Tensor:
        shape = self.y.shape[0], self.y.shape[1] // 2
        return self.scratch.take(purpose, shape, self.wide, self.y.device)

    def hidden(self) -> Tensor:
        """`h [n, I]`, in at least float32."""
        return torch.addcmul(self.silu, self.linear, self.silu, out=self.take("hidden, wide"))

    def pull_back(self, d_hidden: Tensor) -> Tensor:
        """`d_hidden [n, I]` -> the gradient of y, in y's place; where a clamp holds it is zero."""
        d_up = self.silu.mul_(d_hidden)
        d_silu = self.linear.add_(1).mul_(d_hidden)
        d_gate = torch.ops.aten.silu_backward.grad_input(d_silu, self.z, grad_input=self.z)
        clamped, limit = torch.ops.aten.hardtanh_backward.grad_input, self._just_over_the_limit()
        self.y[:, 0::2] = clamped(d_gate, self.gate, -torch.inf, limit, grad_input=d_gate)
        self.y[:, 1::2] = clamped(d_up, self.up, -limit, limit, grad_input=d_up)
        return self.y

    def _just_over_the_limit(self) -> float:
        """hardtanh's gradient is zero at its bounds, that of a clamp only beyond them."""
        limit = torch.tensor(self.limit, dtype=self.wide)
        return torch.nextafter(limit, torch.full_like(limit, torch.inf)).item()


@dataclass
class _Pass:
    """One way through a layer, forward or backward."""

    experts: FrozenExperts
    x: Tensor  # [T, H]
    order: Order
    up: Factors | None  # made ready for the products
    down: Factors | None

    def groups(self) -> Iterator[Group]:
        return self.order.groups(self.experts.group_size())

    def take(self, purpose: str, group: Group, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[n, width]` of scratch memory for the rows of a group."""
        shape = group.rows.stop - group.rows.start, width
        return self.experts.scratch.take(purpose, shape, dtype or self.x.dtype, self.x.device)

    def rows(self, purpose: str, group: Group, per_token: Tensor) -> Tensor:
        """`per_token [T, M]` -> `[n, M]`: for each row of the group what its token has."""
        out = self.take(purpose, group, per_token.shape[1], per_token.dtype)
        return torch.index_select(per_token, 0, self.order.token[group.rows], out=out)

    def low(self, purpose: str, group: Group, factors: Factors | None) -> Tensor | None:
        return None if factors is None else self.take(purpose, group, factors.rank)

    def project(self, name: str, group: Group) -> Projection:
        factors = self.up if name == "gate_up_proj" else self.down
        return Projection(group, self.experts, name, factors, self.x.dtype)

    def wide(self, purpose: str, group: Group, rows: Tensor) -> Tensor:
        """`rows` in at least float32: themselves where they already are."""
        if rows.dtype == wide_of(rows.dtype):
            return rows
        return self.take(purpose, group, rows.shape[1], wide_of(rows.dtype)).copy_(rows)

    def narrow(self, purpose: str, group: Group, rows: Tensor) -> Tensor:
        """`rows` in the dtype of the products."""
        if rows.dtype == self.x.dtype:
            return rows
        return self.take(purpose, group, rows.shape[1]).copy_(rows)

    def activation(self, group: Group, rows: Tensor, up: Projection, low: Tensor | None) -> Activation:
        y = self.take("y", group, 2 * self.experts.intermediate_size)
        return Activation(up.apply(rows, y, low), self.experts)


class CpuProducts:
    """The back end of CPUs."""

    def forward(
        self, x: Tensor, scores: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Tensor:  # fmt: skip
        """`x [T, H]`, `scores [T, k]` -> `[T, H]`."""
        order = Order(routing, scores, x.dtype)
        ready = experts.scratch.kept.ready if experts.scratch.kept else Factors.ready
        run = _Pass(experts, x, order, up and ready(up, x.dtype), down and ready(down, x.dtype))
        out = x.new_zeros(x.shape, dtype=wide_of(x.dtype))
        for group in run.groups():
            rows = run.rows("x", group, x)
            low = run.low("low", group, run.up)
            hidden = run.activation(group, rows, run.project("gate_up_proj", group), low).hidden()
            hidden = run.narrow("hidden", group, hidden)
            # The rows of x are done with, and as wide as those of the output.
            y = run.project("down_proj", group).apply(hidden, rows, run.low("low", group, run.down))
            y = run.wide("y, wide", group, y).mul_(order.score[group.rows])
            out.index_add_(0, order.token[group.rows], y)
        return out.to(x.dtype)

    def backward(
        self, x: Tensor, scores: Tensor, d_out: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Gradients:  # fmt: skip
        """`d_out [T, H]` -> the gradients of x, the scores and the factors."""
        order = Order(routing, scores, x.dtype)
        run = _Backward(experts, x, order, up and up.ready(x.dtype), down and down.ready(x.dtype), d_out)
        d_x = x.new_zeros(x.shape, dtype=wide_of(x.dtype))
        d_score = torch.zeros_like(order.score)  # [rows, 1]
        for group in run.groups():
            d_score[group.rows] = run.group(group, d_x)
        d_scores = d_score[order.place, 0][routing.inverse].view(scores.shape).to(scores.dtype)
        d_up = run.up_gradients.result(up) if up and run.up_gradients else None
        d_down = run.down_gradients.result(down) if down and run.down_gradients else None
        return Gradients(d_x.to(x.dtype), d_scores, d_up, d_down)


@dataclass
class _Backward(_Pass):
    d_out: Tensor  # [T, H]

    def __post_init__(self) -> None:
        self.up_gradients = FactorGradients(self.up) if self.up else None
        self.down_gradients = FactorGradients(self.down) if self.down else None

    def group(self, group: Group, d_x: Tensor) -> Tensor:
        """Add a group's gradients, to `d_x [T, H]` among others; returns those of its scores, `[n, 1]`."""
        token, score = self.order.token[group.rows], self.order.score[group.rows]
        x, d_out = self.rows("x", group, self.x), self.rows("d_out", group, self.d_out)
        up, low = self.project("gate_up_proj", group), self.low("low", group, self.up)
        activation = self.activation(group, x, up, low)
        self.experts.note_gradient(self.order.expert[group.rows], d_out, score[:, 0])
        hidden = activation.hidden()
        d_hidden, d_score = self._down(group, hidden, d_out, score)
        d_y = activation.pull_back(d_hidden)
        d_low = self.low("d_low", group, self.up)
        d_rows = self.take("y, wide", group, x.shape[1], wide_of(x.dtype))
        # The rows of d_out are done with, and as wide as those of x.
        up.pull_back(d_y, d_rows, d_low, d_out)
        if self.up_gradients and low is not None and d_low is not None:
            self.up_gradients.add(group, x, low, d_low, d_y)
        d_x.index_add_(0, token, d_rows)
        return d_score

    def _down(self, group: Group, hidden: Tensor, d_out: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden [n, I]`, `d_out [n, H]` of the weighted output -> gradients of hidden and of the scores.

        The output itself is not needed for the latter: <d_out, W h + B A h + b> = <d_hidden, h> + <d_out, b>,
        with d_hidden of the unweighted output.
        """
        down = self.project("down_proj", group)
        d_low = self.low("d_low", group, self.down)
        narrow = self.take("hidden", group, hidden.shape[1])
        d_hidden = self.take("d_hidden", group, hidden.shape[1], hidden.dtype)
        down.pull_back(d_out, d_hidden, d_low, narrow)
        bias = self.experts.bias("down_proj").to(d_out.dtype)
        product = torch.mul(d_hidden, hidden, out=self.take("product", group, hidden.shape[1], hidden.dtype))
        d_score = product.sum(1, keepdim=True)
        for expert, part in group.parts:
            d_score[part] += d_out[part] @ bias[expert].unsqueeze(1)
        if self.down_gradients and self.down and d_low is not None:
            narrow = self.narrow("hidden", group, hidden)
            low = self.take("low, down", group, self.down.rank)
            for expert, part in group.parts:
                torch.mm(narrow[part], self.down.a[expert].t(), out=low[part])
            # The score weights the narrow tensors, which is the same and less work.
            self.down_gradients.add(group, narrow, low.mul_(score), d_low.mul_(score), d_out)
        return d_hidden.mul_(score), d_score
