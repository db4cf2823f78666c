"""A group's products and activation by the native library, which multiplies packed weights as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.model.cpu_rows import Group, Limit, Pass, Projection
from finetune.model.native.products import NativeProducts, Parts

# Values of an expert's rows at work at once: with experts of gpt-oss-20b's size some 250 rows, whose 20 MB
# stay in the last cache from one operation to the next; smaller ones share the calls.
GROUP_VALUES = 1 << 22


@dataclass
class NativeArithmetic:
    """Experts of a group need not be consecutive."""

    run: Pass
    native: NativeProducts

    @staticmethod
    def padded(rows: int, dtype: torch.dtype) -> int:
        return rows

    def limit(self) -> Limit:
        experts = self.run.experts
        row = 2 * experts.hidden_size + 4 * experts.intermediate_size
        return Limit(experts.num_experts, max(1, GROUP_VALUES // row), consecutive=False)

    def _packed(self, name: str) -> tuple[Tensor, Tensor]:
        packed = self.run.experts.packed(name)
        assert packed is not None, "native products are for packed weights"
        return packed

    def apply(
        self, projection: Projection, group: Group, rows: Tensor, low: Tensor | None, into: str
    ) -> Tensor:
        """`rows [n, in]`, and after LoRA's first factor `low [n, R]` -> `[n, out]`, in float32."""
        name, experts, factors = projection.name, self.run.experts, projection.factors
        out = self.run.take(f"{into}, wide", group, experts.features(name)[1], torch.float32)
        return self.native.multiply(
            _parts(group), *self._packed(name), rows, out, low=low, factor=factors.b if factors else None,
            bias=experts.bias(name).detach(),
        )  # fmt: skip

    def pull_back(
        self, projection: Projection, group: Group, d_out: Tensor, d_low: Tensor | None, into: str, spare: str
    ) -> Tensor:
        """`d_out [n, out]`, and the gradient of `low` -> that of the rows, `[n, in]` in float32."""
        name, experts, factors = projection.name, self.run.experts, projection.factors
        d_rows = self.run.take(into, group, experts.features(name)[0], torch.float32)
        return self.native.multiply(
            _parts(group), *self._packed(name), d_out, d_rows, low=d_low,
            factor=factors.a if factors else None, transposed=True,
        )  # fmt: skip

    def lower(self, group: Group, rows: Tensor, factor: Tensor, into: str) -> Tensor:
        """`rows [n, M]`, `factor [E, R, M]` -> `[n, R]`: each row by its expert's."""
        return self.native.lower(_parts(group), rows, factor, self.run.take(into, group, factor.shape[1]))

    def sum_up(self, group: Group, low: Tensor, rows: Tensor, out: Tensor) -> None:
        """`low [n, R]`, `rows [n, M]` -> of each expert `low.T @ rows`, in its place of `out [E, R, M]`."""
        self.native.sum_up(_parts(group), low, rows, out)

    def activation(self, group: Group, y: Tensor) -> NativeActivation:
        return NativeActivation(self, group, y)


def _parts(group: Group) -> Parts:
    experts, rows = zip(*group.parts, strict=True)
    return Parts(experts, [part.start for part in rows], [part.stop - part.start for part in rows])


@dataclass
class NativeActivation:
    """Of `y [n, 2I]` in float32, gate and up interleaved."""

    arithmetic: NativeArithmetic
    group: Group
    y: Tensor

    def hidden(self) -> Tensor:
        """`h [n, I]`, in the dtype of the products."""
        run = self.arithmetic.run
        hidden = run.take("hidden", self.group, self.y.shape[1] // 2)
        return self.arithmetic.native.activate(self.y, hidden, run.experts.alpha, run.experts.limit)

    def pull_back(self, d_hidden: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """`d_hidden [n, I]` of the unweighted output, `score [n, 1]` -> the gradient of y in the dtype of the
        products, and `<d_hidden, h> [n, 1]`. Where a clamp holds the gradient is zero."""
        run = self.arithmetic.run
        d_y = run.take("d_y", self.group, self.y.shape[1])
        d_score = self.arithmetic.native.activate_back(
            self.y, d_hidden, score, d_y, run.experts.alpha, run.experts.limit
        )
        return d_y, d_score
