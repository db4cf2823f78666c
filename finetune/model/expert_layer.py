"""The expert layer as one autograd function: frozen experts decoded group by group, LoRA trained.

For each token t and each of its top-k experts e, with scores s (Shazeer et al. 2017, and openai/gpt-oss
`torch/model.py`):

    y = W_up[e] x + b_up[e] + B_up[e] A_up[e] x          gate = y[0::2], up = y[1::2]
    h = (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate))
    out[t] += s * (W_down[e] h + b_down[e] + B_down[e] A_down[e] h)

Rows are sorted by expert once. A back end decodes a group of experts to scratch memory that every layer
reuses, multiplies it with the rows routed to it, and forgets it. Only x and the routing are saved: backward
decodes again and recomputes y, but not the down projection, because the gradient of a score needs only
<dout, W h + B A h + b>, which is <W' dout, h> + ... No gradient of the frozen weights is ever formed, and
sums run in a fixed order, so results repeat bit for bit.

Letters in shapes: T tokens, k experts a token, N = T * k rows, E experts, g of them in a group, n rows of
that group, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from finetune.model.experts import Decoder, Scratch
    from finetune.model.kernels.stream import ExpertStream


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
    """The products of the layer for a kind of device: `finetune.model.cpu`, `finetune.model.kernels.wide`."""

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
    stream: ExpertStream | None

    def packed(self, name: str) -> tuple[Tensor, Tensor] | None: ...  # blocks and scales
    def back_end(self, x: Tensor) -> BackEnd: ...

    @property
    def gate_up_proj_bias(self) -> Tensor: ...  # [E, 2I]
    @property
    def down_proj_bias(self) -> Tensor: ...  # [E, H]
    def group_size(self) -> int: ...
    def features(self, parameter_name: str) -> tuple[int, int]: ...
    def bias(self, parameter_name: str) -> Tensor: ...  # [E, out]
    def write_weights(
        self, first: int, last: int, outs: dict[str, Tensor], decode: Decoder, backward: bool
    ) -> None: ...
    def features_at_once(self, parameter_name: str) -> int: ...
    def weights(
        self, name: str, first: int, last: int, dtype: torch.dtype, features: slice = ...
    ) -> Sequence[Tensor]: ...  # of each expert [out, in], or those of the features
    def note_gradient(self, expert: Tensor, d_rows: Tensor, score: Tensor) -> None: ...


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


def clamped_swiglu(y: Tensor, alpha: float, limit: float) -> Tensor:
    """`y [n, 2I]`, gate and up interleaved -> `[n, I]`, in at least float32."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    gate, up = y[:, 0::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


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
