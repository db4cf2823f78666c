"""The expert layer's products over widened rows: base, LoRA and bias of a projection in one product.

A projection of a token's row x, with frozen W and b and LoRA factors A and B, is one product

    W x + B (s A x) + b = [W | B | b | 0] [x | s A x | 1 | 0]

so the low-rank part costs no pass of its own over the outputs, and the bias none at all. The same scratch
`[g, out, W]` serves both directions: forward multiplies with its transpose, and backward's
d = dy [W | B | b | 0] holds the gradients of x and of s A x. With d from an unweighted output of the down
projection, the gradient of its score is the dot product of d and the widened row, bias included, so that
output is never computed again.

Scratch is filled for a few experts at a time and shared by all layers; how many, and how many of their rows
are worked on at once, follows from the memory that is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from finetune.model.expert_layer import Factors, FrozenExperts, Gradients, Routing
from finetune.model.kernels.budget import Budget, Chunk
from finetune.model.kernels.products import multiply, outer
from finetune.model.kernels.steps import Steps, steps_for
from finetune.model.kernels.stream import EXPERTS

Result = TypeVar("Result")

# Rows are multiples of 16 bytes, which grouped_mm and the kernels' accesses ask for: 8 elements of bfloat16.
EIGHT = 8


@dataclass(frozen=True)
class Part:
    """Some sorted rows of a chunk's experts."""

    rows: slice
    ends: Tensor  # [g] int32: where each expert's rows end, counted from the part's first row
    filled: Tensor | None  # [f]: the experts that have rows here, where there are others
    filled_ends: Tensor  # [f] int32

    @classmethod
    def of(cls, rows: slice, ends: Tensor, host_ends: Sequence[int]) -> Part:
        """`ends [g]`, on the device and on the host, are counted from the first of all rows."""
        own = (ends - rows.start).clamp(0, rows.stop - rows.start)
        starts = [rows.start, *host_ends[:-1]]
        places = [
            place
            for place, (start, end) in enumerate(zip(starts, host_ends, strict=True))
            if min(end, rows.stop) > max(start, rows.start)
        ]
        if len(places) == len(host_ends):
            return cls(rows, own, None, own)
        filled = torch.tensor(places).to(ends.device, non_blocking=True)  # must not wait for the GPU
        return cls(rows, own, filled, own[filled])

    def add(self, total: Tensor, products: Tensor) -> None:
        """`products [f, ...]` to the experts' `total [g, ...]`."""
        if self.filled is None:
            total += products
        else:
            total[self.filled] += products


@dataclass
class Projection:
    """One projection of a chunk's experts."""

    experts: slice
    weights: Tensor  # [g, out, W]: [W | B | b | 0]
    inputs: int
    a: Tensor | None  # [g, R, in], R padded to a multiple of 8
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[1]

    def complete(self, rows: Tensor, part: Part) -> None:
        """Widen `rows [n, W]`, whose first `inputs` columns are there."""
        one = self.inputs + self.rank
        if self.a is not None:
            low = multiply(rows[:, : self.inputs], self.a.transpose(1, 2), part.ends)
            torch.mul(low, self.scale, out=self.low(rows))
        rows[:, one] = 1
        rows[:, one + 1 :] = 0

    def low(self, rows: Tensor) -> Tensor:
        """The low-rank columns of widened rows, `[n, R]`."""
        return rows[:, self.inputs : self.inputs + self.rank]

    def apply(self, rows: Tensor, part: Part) -> Tensor:
        """Widened rows `[n, W]` -> `[n, out]`."""
        return multiply(rows, self.weights.transpose(1, 2), part.ends)

    def pull_back(self, d_out: Tensor, part: Part) -> Tensor:
        """Gradient of the outputs `[n, out]` -> of the widened rows `[n, W]`."""
        return multiply(d_out, self.weights, part.ends)

    def learn(
        self, grad: Factors, rows: Tensor, d_rows: Tensor, d_out: Tensor, part: Part,
        score: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Add to the factors' gradients; returns what LoRA adds to the gradient of the inputs, `[n, in]`.

        `rows` and `d_rows [n, W]` are widened, `d_out [n, out]`; all gradients are still to be weighted by
        `score [n]`, which here meets the narrow tensors alone.
        """
        assert self.a is not None
        low, d_low = self.low(rows), self.low(d_rows) * self.scale
        if score is not None:
            low, d_low = ((x * score.unsqueeze(1)).to(rows.dtype) for x in (low, d_low))
        rank = grad.a.shape[1]
        part.add(grad.b[self.experts], outer(d_out, low, part.filled_ends)[:, :, :rank])
        part.add(grad.a[self.experts], outer(d_low, rows[:, : self.inputs], part.filled_ends)[:, :rank])
        return multiply(d_low, self.a, part.ends)


@dataclass
class Wide:
    """A back end of the expert layer: `forward` and `backward` of all its rows."""

    steps: Steps
    budget: Budget

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Wide:
        return cls(steps_for(device, dtype), Budget.of(device))

    def forward(
        self, x: Tensor, scores: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Tensor:  # fmt: skip
        """`x [T, H]`, `scores [T, k]` -> `[T, H]`."""
        return self._with_less_memory(
            experts, x, up, down, lambda: _Pass(self, x, routing, experts, up, down).forward(scores)
        )

    def backward(
        self, x: Tensor, scores: Tensor, d_out: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> Gradients:  # fmt: skip
        """`d_out [T, H]` -> the gradients of x, the scores and the factors."""
        return self._with_less_memory(
            experts, x, up, down, lambda: _Pass(self, x, routing, experts, up, down).backward(scores, d_out)
        )

    def _with_less_memory(
        self, experts: FrozenExperts, x: Tensor, up: Factors | None, down: Factors | None,
        run: Callable[[], Result],
    ) -> Result:  # fmt: skip
        """Where memory runs out, begin again with half the budget, down to one expert at a time."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                if not self.budget.halve(_Sizes.of(experts, x.dtype, up, down).expert_bytes):
                    raise
                experts.scratch.clear()
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Sizes:
    """Of what is worked on at once; widths in elements."""

    up_width: int
    down_width: int
    expert_bytes: int
    row_bytes: int

    @classmethod
    def of(
        cls, experts: FrozenExperts, dtype: torch.dtype, up: Factors | None, down: Factors | None
    ) -> _Sizes:
        hidden, inner = experts.hidden_size, experts.intermediate_size
        up_width, down_width = hidden + _extra(up), inner + _extra(down)
        weights = 2 * inner * up_width + hidden * down_width
        # Backward's peak: x, y, hidden and their gradients widened, the outputs' gradients and LoRA's shares.
        row = 2 * up_width + 2 * inner + 2 * down_width + inner + 2 * hidden
        return cls(up_width, down_width, weights * dtype.itemsize, row * dtype.itemsize)


def _extra(factors: Factors | None) -> int:
    """Columns beside the weights: the rank, a one for the bias, zeros up to a multiple of 8."""
    return _padded_rank(factors) + EIGHT


def _padded_rank(factors: Factors | None) -> int:
    return 0 if factors is None else -(-factors.a.shape[1] // EIGHT) * EIGHT


class _Pass:
    """One run, forward or backward, of one layer's rows."""

    def __init__(
        self, wide: Wide, x: Tensor, routing: Routing, experts: FrozenExperts,
        up: Factors | None, down: Factors | None,
    ) -> None:  # fmt: skip
        self.steps, self.budget = wide.steps, wide.budget
        self.x, self.routing, self.experts = x, routing, experts
        self.up, self.down = up, down
        self.sizes = _Sizes.of(experts, x.dtype, up, down)

    def forward(self, scores: Tensor) -> Tensor:
        out_rows = self.x.new_empty(self.routing.order.numel(), self.x.shape[1])  # [N, H]
        for up, down, parts in self._chunks(backward=False):
            for part in parts:
                y = up.apply(self._x_rows(up, part), part)
                out_rows[part.rows] = down.apply(self._hidden_rows(y, down, part), part)
        return self.steps.combine(out_rows, self.routing.inverse, self.routing.top_k, scores)

    def backward(self, scores: Tensor, d_out: Tensor) -> Gradients:
        routing, x = self.routing, self.x
        rows, wide = routing.order.numel(), torch.promote_types(x.dtype, torch.float32)
        x_rows, score_rows = x.new_empty(rows, x.shape[1]), x.new_empty(rows, dtype=wide)
        d_up, d_down = _zeros_like(self.up), _zeros_like(self.down)
        sorted_scores = scores.reshape(-1)[routing.order].to(wide)  # [N]
        for up, down, parts in self._chunks(backward=True):
            for part in parts:
                score = sorted_scores[part.rows]
                x_part, score_part = x_rows[part.rows], score_rows[part.rows]
                self._backward_part(up, down, part, score, d_out, d_up, d_down, x_part, score_part)
        d_x = self.steps.combine(x_rows, routing.inverse, routing.top_k, None)
        d_scores = score_rows[routing.inverse].view(scores.shape).to(scores.dtype)
        return Gradients(d_x, d_scores, d_up, d_down)

    def _backward_part(
        self, up: Projection, down: Projection, part: Part, score: Tensor, d_out: Tensor,
        d_up: Factors | None, d_down: Factors | None, x_part: Tensor, score_part: Tensor,
    ) -> None:  # fmt: skip
        """Fill some rows' gradients, `x_part [n, H]` and `score_part [n]`, and add to those of the factors.

        `score [n]` weights the rows; `d_out [T, H]`.
        """
        steps, experts = self.steps, self.experts
        rows = self._x_rows(up, part)
        y = up.apply(rows, part)  # [n, 2I]
        hidden = self._hidden_rows(y, down, part)
        d_rows = x_part.new_empty(x_part.shape)
        steps.gather(d_out, self.routing.token[part.rows], d_rows)  # [n, H]
        experts.note_gradient(self.routing.expert[part.rows], d_rows, score)
        d_hidden = down.pull_back(d_rows, part)  # [n, W], of the unweighted output
        score_part.copy_(steps.row_dots(d_hidden, hidden))
        further = down.learn(d_down, hidden, d_hidden, d_rows, part, score) if d_down else None
        d_hidden = d_hidden[:, : down.inputs]
        d_y = steps.swiglu_gradient(y, d_hidden, further, score, experts.alpha, experts.limit)
        d_rows = up.pull_back(d_y, part)  # [n, W]
        if d_up:
            further = up.learn(d_up, rows, d_rows, d_y, part)
            torch.add(d_rows[:, : up.inputs], further, out=x_part)
        else:
            x_part.copy_(d_rows[:, : up.inputs])

    def _x_rows(self, up: Projection, part: Part) -> Tensor:
        """Widened rows `[n, W]` of x."""
        rows = self.x.new_empty(part.rows.stop - part.rows.start, self.sizes.up_width)
        self.steps.gather(self.x, self.routing.token[part.rows], rows[:, : up.inputs])
        up.complete(rows, part)
        return rows

    def _hidden_rows(self, y: Tensor, down: Projection, part: Part) -> Tensor:
        """Widened rows `[n, W]` of the activation of `y [n, 2I]`."""
        rows = y.new_empty(y.shape[0], self.sizes.down_width)
        self.steps.swiglu(y, rows[:, : down.inputs], self.experts.alpha, self.experts.limit)
        down.complete(rows, part)
        return rows

    def _chunks(self, backward: bool) -> Iterator[tuple[Projection, Projection, list[Part]]]:
        """Both projections of some experts, in scratch that the next ones overwrite, and their rows."""
        sizes, experts = self.sizes, self.experts
        together = EXPERTS if experts.stream is not None else None
        all_ends = self.routing.host_ends
        for chunk in self.budget.chunks(all_ends, sizes.expert_bytes, sizes.row_bytes, together):
            chosen = slice(chunk.first, chunk.last)
            ends, on_host = self.routing.ends[chosen], all_ends[chosen]
            parts = [Part.of(rows, ends, on_host) for rows in chunk.parts]
            widths = {"gate_up_proj": sizes.up_width, "down_proj": sizes.down_width}
            outs = {name: self._scratch(name, chunk, width) for name, width in widths.items()}
            experts.write_weights(chunk.first, chunk.last, outs, self.steps.decode, backward)
            up = self._projection("gate_up_proj", chunk, self.up, outs["gate_up_proj"])
            yield up, self._projection("down_proj", chunk, self.down, outs["down_proj"]), parts

    def _scratch(self, name: str, chunk: Chunk, width: int) -> Tensor:
        """`[g, out, W]`"""
        shape = chunk.last - chunk.first, self.experts.features(name)[1], width
        return self.experts.scratch.take(name, shape, self.x.dtype, self.x.device)

    def _projection(self, name: str, chunk: Chunk, factors: Factors | None, weights: Tensor) -> Projection:
        """Of `weights [g, out, W]` whose first columns are there."""
        inputs = self.experts.features(name)[0]
        chosen, rank = slice(chunk.first, chunk.last), _padded_rank(factors)
        weights[..., inputs:] = 0
        weights[..., inputs + rank] = self.experts.bias(name)[chosen]
        if factors is None:
            return Projection(chosen, weights, inputs, None)
        weights[..., inputs : inputs + factors.rank] = factors.b[chosen]
        a = weights.new_zeros(weights.shape[0], rank, inputs)
        a[:, : factors.rank] = factors.a[chosen]
        return Projection(chosen, weights, inputs, a, factors.scale)


def _zeros_like(factors: Factors | None) -> Factors | None:
    """In the memory order of the factors, which are views of parameters laid out otherwise."""
    if factors is None:
        return None
    return Factors(torch.zeros_like(factors.a), torch.zeros_like(factors.b), factors.scale)
