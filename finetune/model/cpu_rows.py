"""The rows of an expert layer on a CPU: sorted by expert, padded, taken a group of experts at a time.

Fresh memory costs more here than the arithmetic of small operations (every page of it is cleared by the
system first), so whatever has as many rows as a group lives in scratch memory, and what a group's rows give
is added to their tokens at once, experts in order: nothing as long as all rows is kept, and sums repeat bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.model.expert_layer import Factors, FrozenExperts, Routing


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What sums, and the activation between the projections, are computed in."""
    return torch.promote_types(dtype, torch.float32)


class Part(NamedTuple):
    """An expert, and where its rows are in its group's buffers."""

    expert: int
    rows: slice


class Group(NamedTuple):
    """Experts that all have rows, in order, and where their rows are among all."""

    parts: list[Part]
    rows: slice


class Limit(NamedTuple):
    """What a group may hold; a single expert always fits."""

    experts: int
    rows: int
    consecutive: bool  # not even experts without a row may lie between


class Order:
    """Rows sorted by expert, each expert's padded with rows of weight zero where its products ask for it."""

    def __init__(
        self, routing: Routing, scores: Tensor, dtype: torch.dtype, padded: Callable[[int], int]
    ) -> None:
        """`scores [T, k]`; `dtype` is that of the products, `padded` gives the rows that an expert's take."""
        ends = routing.host_ends
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.lengths = [padded(count) if count else 0 for count in counts]
        padding = torch.tensor([0, *self.lengths]).cumsum(0)[:-1] - torch.tensor([0, *ends[:-1]])
        # Of each sorted row its place among the padded ones, [N].
        self.place = torch.arange(len(routing.order)) + padding[routing.expert]
        rows = sum(self.lengths)
        self.token = routing.token.new_zeros(rows).index_copy_(0, self.place, routing.token)
        self.expert = routing.expert.new_zeros(rows).index_copy_(0, self.place, routing.expert)
        score = scores.reshape(-1)[routing.order].to(wide_of(dtype))
        self.score = score.new_zeros(rows).index_copy_(0, self.place, score).unsqueeze(1)  # [rows, 1]

    def groups(self, limit: Limit) -> Iterator[Group]:
        """As large as the limit lets them be; experts without a row are passed over."""
        parts: list[Part] = []
        start = end = 0
        for expert, length in enumerate(self.lengths):
            full = len(parts) == limit.experts or end - start + length > limit.rows
            if parts and (limit.consecutive if not length else full):
                yield Group(parts, slice(start, end))
                parts, start = [], end
            if length:
                parts.append(Part(expert, slice(end - start, end - start + length)))
                end += length
        if parts:
            yield Group(parts, slice(start, end))


@dataclass
class Pass:
    """One way through a layer, forward or backward, with scratch memory for a group's rows."""

    experts: FrozenExperts
    x: Tensor  # [T, H]
    order: Order

    def take(self, purpose: str, group: Group, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[n, width]` of scratch memory for the rows of a group."""
        shape = group.rows.stop - group.rows.start, width
        return self.experts.scratch.take(purpose, shape, dtype or self.x.dtype, self.x.device)

    def rows(self, purpose: str, group: Group, per_token: Tensor) -> Tensor:
        """`per_token [T, M]` -> `[n, M]`: for each row of the group what its token has."""
        out = self.take(purpose, group, per_token.shape[1], per_token.dtype)
        return torch.index_select(per_token, 0, self.order.token[group.rows], out=out)

    def wide(self, purpose: str, group: Group, rows: Tensor) -> Tensor:
        """`rows` in at least float32: themselves where they already are."""
        if rows.dtype == wide_of(rows.dtype):
            return rows
        return self.take(purpose, group, rows.shape[1], wide_of(rows.dtype)).copy_(rows)


@dataclass
class Projection:
    """`gate_up_proj` or `down_proj` with its LoRA, made ready for the products."""

    name: str
    factors: Factors | None

    @property
    def a(self) -> Tensor | None:
        """`[E, R, in]`: by it rows come to LoRA's rank."""
        return self.factors.a if self.factors else None

    @cached_property
    def b(self) -> Tensor | None:
        """`[E, R, out]`: by it gradients come there."""
        return self.factors.b.transpose(1, 2).contiguous() if self.factors else None
