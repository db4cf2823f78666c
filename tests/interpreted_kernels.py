"""Every Triton kernel under Triton's interpreter against float64: prints the errors as JSON.

    TRITON_INTERPRET=1 python -m tests.interpreted_kernels [DEVICE]

The variable must be there before Triton is imported, hence a program of its own. On a machine with a GPU,
`DEVICE` cuda, without the variable, runs the kernels themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from finetune.model.kernels.steps import TorchSteps, TritonSteps
from tests.model_kit import decode_by_definition, relative_error

# Rows that fill no tile, and lengths that are no power of two: 24 is less than a tile, 1048 more than two.
ROWS, LENGTHS = 13, (24, 1048)
DTYPES = (torch.float32, torch.bfloat16)
WIDER = 16  # columns of the rows that others lie in
STEPS, REFERENCE = TritonSteps(), TorchSteps()
# Of the program; what imports this has arguments of its own.
DEVICE = torch.device(sys.argv[1] if __name__ == "__main__" and len(sys.argv) > 1 else "cpu")


class Inputs:
    """Random tensors of one dtype, and rows that lie in wider ones full of NaN."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.random = dtype, torch.Generator().manual_seed(0)

    def values(self, *shape: int, size: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self.random, dtype=torch.float64) * size
        return drawn.to(DEVICE, self.dtype)

    def index(self, count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.random).to(DEVICE)

    def poisoned(self, rows: int, columns: int) -> Tensor:
        """Rows to write to: what is not written stays NaN, in them and beside them."""
        return torch.full((rows, columns + WIDER), torch.nan, dtype=self.dtype, device=DEVICE)


def _error(found: Tensor, expected: Tensor, beside: Tensor | None = None) -> float:
    """Relative to the largest value; infinite where something was not written, or something beside was."""
    if beside is not None and not bool(beside.isnan().all()):
        return float("inf")
    error = relative_error(found.cpu(), expected.cpu())
    return error if error == error else float("inf")


def decode(inputs: Inputs, length: int) -> float:
    """All codes under all scales, those of zero and NaN included, in rows of `length // 8` blocks."""
    scale = torch.arange(256, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    in_row = length // 8
    scales = scale.repeat_interleave(16)[: 4096 // (2 * in_row) * (2 * in_row)].view(2, -1, in_row)
    blocks = codes.repeat(256, 1)[: scales.numel()].view(*scales.shape, 16)
    out = inputs.poisoned(scales.numel() // in_row, in_row * 32).view(2, -1, in_row * 32 + WIDER)
    STEPS.decode(blocks.to(DEVICE), scales.to(DEVICE), out)
    expected = decode_by_definition(blocks, scales)
    # The largest scales overflow both dtypes; of the smallest the interpreter's bfloat16 knows nothing.
    smallest = 2.0**-126 if inputs.dtype == torch.bfloat16 and DEVICE.type == "cpu" else 0.0
    expected = torch.where(expected.abs() < smallest, 0, expected).to(inputs.dtype).double()
    found, beside = out[..., : in_row * 32].cpu().double(), out[..., in_row * 32 :]
    found = torch.where(found.abs() < smallest, 0, found)
    same = (found == expected) | (found.isnan() & expected.isnan())
    return 0.0 if bool(same.all()) and bool(beside.isnan().all()) else float("inf")


def gather(inputs: Inputs, length: int) -> float:
    x, index, out = inputs.values(9, length), inputs.index(ROWS, 9), inputs.poisoned(ROWS, length)
    STEPS.gather(x, index, out[:, :length])
    return _error(out[:, :length], x[index], out[:, length:])


def combine(inputs: Inputs, length: int, weighted: bool = False) -> float:
    rows, place = inputs.values(4 * ROWS, length), inputs.index(4 * ROWS, 4 * ROWS)
    scores = inputs.values(ROWS, 4) if weighted else None
    expected = REFERENCE.combine(rows.double(), place, 4, None if scores is None else scores.double())
    return _error(STEPS.combine(rows, place, 4, scores), expected)


def combine_weighted(inputs: Inputs, length: int) -> float:
    return combine(inputs, length, weighted=True)


def row_dots(inputs: Inputs, length: int) -> float:
    left, right = inputs.values(ROWS, length + WIDER)[:, :length], inputs.values(ROWS, length)
    return _error(STEPS.row_dots(left, right), (left.double() * right.double()).sum(1))


def swiglu(inputs: Inputs, length: int) -> float:
    y, out = inputs.values(ROWS, 2 * length, size=5.0), inputs.poisoned(ROWS, length)
    expected = torch.empty(ROWS, length, dtype=torch.float64, device=DEVICE)
    REFERENCE.swiglu(y.double(), expected, 1.702, 7.0)
    STEPS.swiglu(y, out[:, :length], 1.702, 7.0)
    return _error(out[:, :length], expected, out[:, length:])


def swiglu_gradient(inputs: Inputs, length: int, with_lora: bool = False) -> float:
    y, score = inputs.values(ROWS, 2 * length, size=5.0), inputs.values(ROWS).float()
    d_hidden = inputs.values(ROWS, length + WIDER)[:, :length]
    further = inputs.values(ROWS, length) if with_lora else None
    # By autograd, so that the formula of the gradient is tested, too.
    wide = y.double().requires_grad_()
    gate, up = wide[:, 0::2].clamp(max=7.0), wide[:, 1::2].clamp(-7.0, 7.0)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    d = d_hidden.double() * score.double().unsqueeze(1) + (further.double() if further is not None else 0)
    (expected,) = torch.autograd.grad(hidden, wide, d)
    return _error(STEPS.swiglu_gradient(y, d_hidden, further, score, 1.702, 7.0), expected)


def swiglu_gradient_with_lora(inputs: Inputs, length: int) -> float:
    return swiglu_gradient(inputs, length, with_lora=True)


KERNELS: dict[str, Callable[[Inputs, int], float]] = {
    function.__name__: function
    for function in (
        decode, gather, combine, combine_weighted, row_dots, swiglu, swiglu_gradient,
        swiglu_gradient_with_lora,
    )
}  # fmt: skip


def whole_layer() -> Iterator[tuple[str, float]]:
    """Output and every gradient of the expert layer on these kernels, in float32 (on a GPU in bfloat16)."""
    from finetune.model.kernels.budget import Budget
    from finetune.model.kernels.wide import Wide
    from tests.unit import test_model_expert_layer as layers

    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    layer, case = layers.make_layer(dtype).to(DEVICE), layers.make_case()
    x, scores, d_out = (t.to(dtype).double() for t in (case.x, case.scores, case.d_out))
    rounded = layers.Case(x, case.indices, scores, d_out)
    expected = layers.reference(layer.cpu(), rounded)
    layer = layer.to(DEVICE)
    layer.base.scratch.back_ends[DEVICE, dtype] = Wide(STEPS, Budget(1 << 18))
    on_device = layers.Case(*(t.to(DEVICE) for t in vars(rounded).values()))
    found = layers.run(layer, on_device, dtype)
    for name, a, b in zip(layers.NAMES, found, expected, strict=True):
        yield name, relative_error(a.cpu(), b)


def main() -> None:
    errors: dict[str, dict[str, float]] = {}
    for name, kernel in KERNELS.items():
        errors[name] = {
            str(dtype).removeprefix("torch."): max(kernel(Inputs(dtype), length) for length in LENGTHS)
            for dtype in DTYPES
        }
    errors["whole layer"] = dict(whole_layer())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
