"""The expert layer as one autograd function: frozen experts decoded group by group, LoRA trained.

For each token t and each of its top-k experts e, with scores s (Shazeer et al. 2017, and openai/gpt-oss
`torch/model.py`):

    y = W_up[e] x + b_up[e] + B_up[e] A_up[e] x          gate = y[0::2], up = y[1::2]
    h = (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate))
    out[t] += s * (W_down[e] h + b_down[e] + B_down[e] A_down[e] h)

Rows are sorted by expert once. A group of experts is decoded to scratch memory that every layer reuses,
multiplied with the rows routed to it, and forgotten. Only x and the routing are saved: backward decodes
again and recomputes y, but not the down projection, because the gradient of a score needs only
<dout, W h + B A h + b>, which is <W' dout, h> + ... No gradient of the frozen weights is ever formed, and
sums run in a fixed order, so results repeat bit for bit.

Letters in shapes: T tokens, k experts a token, N = T * k rows, E experts, g of them in a group, n rows of
that group, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from finetune.model.experts import Decoder, Scratch


# grouped_mm wants rows of a multiple of 16 bytes: 8 columns of bfloat16.
RANK_MULTIPLE = 8


@dataclass(frozen=True)
class Factors:
    """LoRA of one projection: the map gains `scale * b a`. Views of the parameters, whose dtype they have."""

    a: Tensor  # [E, R, in]
    b: Tensor  # [E, out, R]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def ready(self, dtype: torch.dtype) -> Factors:
        """Contiguous in `dtype`, padded with zeros to a rank that grouped_mm takes, the scale in `b`."""
        padding = -self.rank % RANK_MULTIPLE
        a = F.pad(self.a, (0, 0, 0, padding)).to(dtype).contiguous()
        b = F.pad(self.b * self.scale, (0, padding)).to(dtype).contiguous()
        return Factors(a, b)

    def gradients(self, ready: Factors) -> Factors:
        """From the gradients of the factors that `ready` gave to those of these."""
        a = ready.a[:, : self.rank].to(self.a.dtype)
        b = ready.b[:, :, : self.rank].to(self.b.dtype) * self.scale
        return Factors(a, b)


class Gradients(NamedTuple):
    """What backward gives: `x [T, H]`, `scores [T, k]`, and of the factors that there are."""

    x: Tensor
    scores: Tensor
    up: Factors | None
    down: Factors | None


class BackEnd(Protocol):
    """The products of the layer for a kind of device; `finetune.model.kernels.wide` has those for GPUs."""

    def forward(
        self, x: Tensor, scores: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Tensor: ...  # fmt: skip
    def backward(
        self, x: Tensor, scores: Tensor, d_out: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Gradients: ...  # fmt: skip


class FrozenExperts(Protocol):
    """What the layer asks of the module that holds the weights."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    alpha: float
    limit: float
    scratch: Scratch

    def back_end(self, x: Tensor) -> BackEnd: ...

    @property
    def gate_up_proj_bias(self) -> Tensor: ...  # [E, 2I]
    @property
    def down_proj_bias(self) -> Tensor: ...  # [E, H]
    def group_size(self, dtype: torch.dtype) -> int: ...
    def features(self, parameter_name: str) -> tuple[int, int]: ...
    def bias(self, parameter_name: str) -> Tensor: ...  # [E, out]
    def write_weights(self, name: str, first: int, last: int, out: Tensor, decode: Decoder) -> None: ...
    def gate_up_weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor: ...  # [g, 2I, H]
    def down_weights(self, first: int, last: int, dtype: torch.dtype) -> Tensor: ...  # [g, H, I]
    def note_gradient(self, expert: Tensor, d_rows: Tensor, score: Tensor) -> None: ...


@dataclass
class Group:
    """Consecutive experts and the sorted rows that go to them."""

    first: int
    last: int
    rows: slice
    ends: Tensor  # [g] int32: where each expert's rows end, counted from the group's first row

    @property
    def experts(self) -> slice:
        return slice(self.first, self.last)

    def per_row(self, per_expert: Tensor) -> Tensor:
        """`per_expert [g, M]` -> `[n or 1, M]`: for each row the entry of its expert."""
        if per_expert.shape[0] == 1:
            return per_expert
        counts = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        return per_expert.repeat_interleave(counts, dim=0, output_size=self.rows.stop - self.rows.start)

    def multiply(self, rows: Tensor, weights: Tensor) -> Tensor:
        """`rows [n, K]` times each row's own `weights [g, K, M]` -> `[n, M]`."""
        if weights.shape[0] == 1:
            return rows @ weights[0]
        return F.grouped_mm(rows, weights, offs=self.ends)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum over each expert's rows of `left [n, M]` outer `right [n, K]` -> `[g, M, K]`."""
        if self.ends.numel() == 1:
            return (left.t() @ right).unsqueeze(0)
        return F.grouped_mm(left.t(), right, offs=self.ends)


class Routing:
    """The order that brings rows of one expert together, and back."""

    def __init__(self, indices: Tensor, num_experts: int) -> None:
        """`indices [T, k]`: each token's experts."""
        self.top_k = indices.shape[1]
        self.expert, self.order = torch.sort(indices.reshape(-1), stable=True)  # [N]
        self.token = self.order // self.top_k  # [N]
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(self.order.numel(), device=indices.device)
        self.ends = torch.bincount(self.expert, minlength=num_experts).cumsum(0).to(torch.int32)  # [E]
        self.host_ends: list[int] = self.ends.tolist()

    def groups(self, size: int) -> Iterator[Group]:
        """Groups of up to `size` experts; those without a row are passed over."""
        start = 0
        for first in range(0, len(self.host_ends), size):
            last = min(first + size, len(self.host_ends))
            end = self.host_ends[last - 1]
            if end > start:
                yield Group(first, last, slice(start, end), self.ends[first:last] - start)
            start = end

    def combine(self, rows: Tensor, scores: Tensor | None = None) -> Tensor:
        """Sum each token's rows, `[N, H] -> [T, H]`, weighted by `scores [T, k]`; the order is fixed."""
        by_token: Tensor = rows[self.inverse].unflatten(0, (-1, self.top_k))
        if scores is not None:
            by_token = by_token * scores.unsqueeze(-1)
        return by_token.sum(1)


class Gated(NamedTuple):
    """The activation of some rows and what its gradient needs, in at least float32."""

    hidden: Tensor  # [n, I]
    gate: Tensor  # clamped
    up: Tensor  # clamped
    sigmoid: Tensor


def clamped_swiglu(y: Tensor, alpha: float, limit: float) -> Gated:
    """`y [n, 2I]`, gate and up interleaved."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    gate = y[:, 0::2].clamp(max=limit)
    up = y[:, 1::2].clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * gate)
    return Gated((up + 1) * gate * sigmoid, gate, up, sigmoid)


def clamped_swiglu_gradient(d_hidden: Tensor, y: Tensor, gated: Gated, alpha: float, limit: float) -> Tensor:
    """Gradient of `y [n, 2I]`, in its dtype; where a clamp holds it is zero."""
    _, gate, up, sigmoid = gated
    d_y = torch.empty_like(y)
    d_y[:, 0::2] = d_hidden * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid)) * (y[:, 0::2] <= limit)
    d_y[:, 1::2] = d_hidden * gate * sigmoid * (y[:, 1::2].abs() <= limit)
    return d_y


class _Projection:
    """One projection of a group: frozen weights, bias and LoRA."""

    def __init__(self, group: Group, weights: Tensor, bias: Tensor, factors: Factors | None) -> None:
        self.group = group
        self.weights = weights  # [g, out, in]
        self.bias = bias[group.experts].to(weights.dtype)
        self.a = factors.a[group.experts] if factors else None  # [g, R, in]
        self.b = factors.b[group.experts] if factors else None  # [g, out, R]

    def low_rank(self, rows: Tensor) -> Tensor | None:
        """`rows [n, in]` through `a` -> `[n, R]`."""
        return None if self.a is None else self.group.multiply(rows, self.a.transpose(1, 2))

    def apply(self, rows: Tensor, low: Tensor | None) -> Tensor:
        """`rows [n, in]` -> `[n, out]`."""
        y = self.group.multiply(rows, self.weights.transpose(1, 2)).add_(self.group.per_row(self.bias))
        if self.b is not None and low is not None:
            y += self.group.multiply(low, self.b.transpose(1, 2))
        return y


def _up_projection(
    experts: FrozenExperts, group: Group, factors: Factors | None, dtype: torch.dtype
) -> _Projection:
    weights = experts.gate_up_weights(group.first, group.last, dtype)
    return _Projection(group, weights, experts.gate_up_proj_bias, factors)


def _down_projection(
    experts: FrozenExperts, group: Group, factors: Factors | None, dtype: torch.dtype
) -> _Projection:
    weights = experts.down_weights(group.first, group.last, dtype)
    return _Projection(group, weights, experts.down_proj_bias, factors)


class _Gradients:
    """Where the groups' gradients are put together."""

    def __init__(self, x: Tensor, routing: Routing, up: Factors | None, down: Factors | None) -> None:
        rows = routing.order.numel()
        self.x_rows = x.new_zeros(rows, x.shape[1])  # [N, H]
        self.score_rows = x.new_zeros(rows, dtype=torch.promote_types(x.dtype, torch.float32))  # [N]
        self.up = Factors(torch.zeros_like(up.a), torch.zeros_like(up.b)) if up else None
        self.down = Factors(torch.zeros_like(down.a), torch.zeros_like(down.b)) if down else None


def _backward_group(
    grads: _Gradients, group: Group, up: _Projection, down: _Projection,
    x_rows: Tensor, d_out: Tensor, score: Tensor, alpha: float, limit: float,
) -> None:  # fmt: skip
    """Add one group's gradients; `x_rows [n, H]`, `d_out [n, H]` of each row's token, `score [n, 1]`."""
    dtype = x_rows.dtype
    low_up = up.low_rank(x_rows)
    y = up.apply(x_rows, low_up)
    gated = clamped_swiglu(y, alpha, limit)
    hidden = gated.hidden.to(dtype)

    d_hidden = group.multiply(d_out, down.weights)  # of the unweighted output
    d_score = (d_hidden * gated.hidden).sum(1) + (d_out * group.per_row(down.bias)).sum(1)
    d_hidden = d_hidden * score
    low_down = down.low_rank(hidden)
    if grads.down and low_down is not None and down.a is not None and down.b is not None:
        d_low = group.multiply(d_out, down.b)  # [n, R]
        d_score = d_score + (d_low * low_down).sum(1)
        d_low = d_low * score
        grads.down.b[group.experts] = group.outer(d_out * score, low_down)
        grads.down.a[group.experts] = group.outer(d_low, hidden)
        d_hidden = d_hidden + group.multiply(d_low, down.a)
    grads.score_rows[group.rows] = d_score

    d_y = clamped_swiglu_gradient(d_hidden, y, gated, alpha, limit)
    d_x = group.multiply(d_y, up.weights)
    if grads.up and low_up is not None and up.a is not None and up.b is not None:
        d_low = group.multiply(d_y, up.b)
        grads.up.b[group.experts] = group.outer(d_y, low_up)
        grads.up.a[group.experts] = group.outer(d_low, x_rows)
        d_x += group.multiply(d_low, up.a)
    grads.x_rows[group.rows] = d_x


class SeparateProducts:
    """The back end of CPUs: base and LoRA in products of their own, rows taken group by group."""

    def forward(
        self, x: Tensor, scores: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Tensor:  # fmt: skip
        """`x [T, H]`, `scores [T, k]` -> `[T, H]`."""
        up, down = up and up.ready(x.dtype), down and down.ready(x.dtype)
        out_rows = x.new_empty(routing.order.numel(), x.shape[1])  # [N, H]
        for group in routing.groups(experts.group_size(x.dtype)):
            x_rows = x[routing.token[group.rows]]
            up_map = _up_projection(experts, group, up, x.dtype)
            y = up_map.apply(x_rows, up_map.low_rank(x_rows))
            hidden = clamped_swiglu(y, experts.alpha, experts.limit).hidden.to(x.dtype)
            down_map = _down_projection(experts, group, down, x.dtype)
            out_rows[group.rows] = down_map.apply(hidden, down_map.low_rank(hidden))
        return routing.combine(out_rows, scores)

    def backward(
        self, x: Tensor, scores: Tensor, d_out: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Gradients:  # fmt: skip
        """`d_out [T, H]` -> the gradients of x, the scores and the factors."""
        up_ready, down_ready = up and up.ready(x.dtype), down and down.ready(x.dtype)
        grads = _Gradients(x, routing, up_ready, down_ready)
        sorted_scores = scores.reshape(-1)[routing.order].to(x.dtype).unsqueeze(1)  # [N, 1]
        for group in routing.groups(experts.group_size(x.dtype)):
            token = routing.token[group.rows]
            up_map = _up_projection(experts, group, up_ready, x.dtype)
            down_map = _down_projection(experts, group, down_ready, x.dtype)
            d_rows, score = d_out[token], sorted_scores[group.rows]
            _backward_group(
                grads, group, up_map, down_map, x[token], d_rows, score, experts.alpha, experts.limit
            )
            experts.note_gradient(routing.expert[group.rows], d_rows, score[:, 0])
        d_scores = grads.score_rows[routing.inverse].view(scores.shape).to(scores.dtype)
        d_up = up.gradients(grads.up) if up and grads.up else None
        d_down = down.gradients(grads.down) if down and grads.down else None
        return Gradients(routing.combine(grads.x_rows), d_scores, d_up, d_down)


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scores: Tensor, up_a: Tensor | None, up_b: Tensor | None,
        down_a: Tensor | None, down_b: Tensor | None, scales: tuple[float, float],
        routing: Routing, experts: FrozenExperts,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, scores, up_a, up_b, down_a, down_b)
        ctx.scales, ctx.routing, ctx.experts = scales, routing, experts
        up, down = _factors(up_a, up_b, scales[0]), _factors(down_a, down_b, scales[1])
        return experts.back_end(x).forward(x, scores, routing, experts, up, down)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, up_a, up_b, down_a, down_b = ctx.saved_tensors
        up, down = _factors(up_a, up_b, ctx.scales[0]), _factors(down_a, down_b, ctx.scales[1])
        d_out = grad_outputs[0].to(x.dtype)  # [T, H]
        grads = ctx.experts.back_end(x).backward(x, scores, d_out, ctx.routing, ctx.experts, up, down)
        d_up = (grads.up.a, grads.up.b) if grads.up else (None, None)
        d_down = (grads.down.a, grads.down.b) if grads.down else (None, None)
        return grads.x, grads.scores, *d_up, *d_down, None, None, None


def _factors(a: Tensor | None, b: Tensor | None, scale: float) -> Factors | None:
    return Factors(a, b, scale) if a is not None and b is not None else None


def run_experts(
    x: Tensor, indices: Tensor, scores: Tensor,
    experts: FrozenExperts, up: Factors | None, down: Factors | None,
) -> Tensor:  # fmt: skip
    """`x [T, H]`, `indices [T, k]` and `scores [T, k]` of the router -> `[T, H]` in x's dtype.

    Differentiable in x, scores and the LoRA factors; x in float32, float64 or bfloat16 decides the
    precision, while the activation between the projections runs in at least float32.
    """
    routing = Routing(indices, experts.num_experts)
    factors = [factor for pair in (up, down) for factor in ((pair.a, pair.b) if pair else (None, None))]
    scales = up.scale if up else 1.0, down.scale if down else 1.0
    out: Tensor = _ExpertLayer.apply(x, scores, *factors, scales, routing, experts)  # type: ignore[no-untyped-call]
    return out
