"""The native library's products, sums and activation are those of float64, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.model.expert_layer import clamped_swiglu
from finetune.model.native.products import NativeProducts, Parts, native_products
from tests.model_kit import decode_by_definition, relative_error

# Sums of some thousand terms in float32: of rounded rows, so bfloat16 is as exact but where it rounds again.
SUMS, ROUNDED = 1e-5, 2**-8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Outputs and inputs: tails of a strip, and depths of one panel and of several (736 words of 4 bytes).
SIZES = [(32, 32), (96, 160), (64, 1504), (1504, 64), (160, 3008), (3008, 96)]


def library(dtype: torch.dtype) -> NativeProducts:
    found = native_products(dtype)
    if found is None:
        pytest.skip("no C compiler, no vectors for this dtype, or matrix units that do better")
    return found


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def packed(experts: int, outs: int, ins: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(outs)
    blocks = torch.randint(0, 256, (experts, outs, ins // 32, 16), generator=source, dtype=torch.uint8)
    return blocks, torch.randint(118, 124, blocks.shape[:3], generator=source, dtype=torch.uint8)


def parts_of(counts: list[int]) -> tuple[Parts, list[tuple[int, slice]]]:
    """Every second expert has rows; so many."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    numbers = [2 * i for i in range(len(counts))]
    rows = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return Parts(numbers, starts, counts), list(zip(numbers, rows, strict=True))


def check_product(
    dtype: torch.dtype, outs: int, ins: int, counts: list[int], rank: int, *, transposed: bool, biased: bool
) -> None:
    native, (parts, each) = library(dtype), parts_of(counts)
    experts, n = 2 * len(counts), sum(counts)
    blocks, scales = packed(experts, outs, ins)
    depth, width = (outs, ins) if transposed else (ins, outs)
    rows, low = random(n, depth, dtype=dtype), random(n, rank, dtype=dtype) if rank else None
    shape = (experts, rank, ins) if transposed else (experts, outs, rank)
    factor = random(*shape, dtype=dtype) if rank else None
    bias = random(experts, width, dtype=dtype) if biased else None
    out = torch.full((n, width), torch.nan)
    native.multiply(
        parts, blocks, scales, rows, out, low=low, factor=factor, bias=bias, transposed=transposed
    )
    expected = torch.zeros(n, width, dtype=torch.float64)
    for expert, part in each:
        weights = decode_by_definition(blocks[expert], scales[expert])
        expected[part] = rows[part].double() @ (weights if transposed else weights.t())
        if low is not None and factor is not None:
            own = factor[expert].double()
            expected[part] += low[part].double() @ (own if transposed else own.t())
        if bias is not None:
            expected[part] += bias[expert].double()
    assert relative_error(out, expected) < SUMS


@DTYPES
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_the_references_at_every_size(
    dtype: torch.dtype, size: tuple[int, int], transposed: bool
) -> None:
    check_product(dtype, *size, [1, 13, 6], rank=8, transposed=transposed, biased=not transposed)


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4), rank=st.sampled_from([0, 2, 8, 24]),
    transposed=st.booleans(), biased=st.booleans(), bfloat16=st.booleans(),
)  # fmt: skip
def test_products_are_the_references_for_any_rows_and_ranks(
    counts: list[int], rank: int, transposed: bool, biased: bool, bfloat16: bool
) -> None:
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    check_product(dtype, 96, 160, counts, rank, transposed=transposed, biased=biased)


@DTYPES
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    native, (parts, _) = library(dtype), parts_of([40, 7])
    blocks, scales = packed(4, 192, 1504)
    rows, before = random(47, 1504, dtype=dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.empty(47, 192)
            results.append(native.multiply(parts, blocks, scales, rows, out, low=None, factor=None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@DTYPES
def test_a_scale_that_is_not_a_number_shows(dtype: torch.dtype) -> None:
    native, (parts, _) = library(dtype), parts_of([3])
    blocks, scales = packed(1, 64, 64)
    scales[0, 5, 1] = 255
    out = native.multiply(
        parts, blocks, scales, random(3, 64, dtype=dtype), torch.empty(3, 64), low=None, factor=None
    )
    assert out.isnan().any(0).nonzero().flatten().tolist() == [5]


@DTYPES
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("width", [32, 96, 224])
def test_rows_come_to_lows_rank_and_their_gradient_back(dtype: torch.dtype, rank: int, width: int) -> None:
    native, (parts, each) = library(dtype), parts_of([1, 37, 6, 2])
    rows, factor = random(46, width, dtype=dtype), random(8, rank, width, dtype=dtype)
    low = native.lower(parts, rows, factor, torch.empty(46, rank, dtype=dtype))
    gradient = torch.zeros(8, rank, width)
    native.sum_up(parts, low, rows, gradient)
    expected_low, expected = torch.zeros(46, rank).double(), torch.zeros(8, rank, width).double()
    for expert, part in each:
        expected_low[part] = rows[part].double() @ factor[expert].double().t()
        expected[expert] = low[part].double().t() @ rows[part].double()
    assert relative_error(low, expected_low) < (SUMS if dtype == torch.float32 else ROUNDED)
    assert relative_error(gradient, expected) < SUMS


ALPHA, LIMIT = 1.702, 7.0


@DTYPES
@pytest.mark.parametrize("size", [1.0, 8.0, 100.0])
def test_the_activation_and_its_gradient_are_the_references(dtype: torch.dtype, size: float) -> None:
    native = library(dtype)
    y, d_hidden, score = random(21, 192) * size, random(21, 96), random(21, 1).abs()
    y[0, :4] = torch.tensor([LIMIT, LIMIT, -LIMIT, -LIMIT])  # a clamp lets its own bound pass
    exact = y.double().requires_grad_()
    expected = clamped_swiglu(exact, ALPHA, LIMIT)
    (d_y,) = torch.autograd.grad(expected, exact, d_hidden.double() * score.double())
    hidden = native.activate(y, torch.empty(21, 96, dtype=dtype), ALPHA, LIMIT)
    found = torch.empty(21, 192, dtype=dtype)
    d_score = native.activate_back(y, d_hidden, score, found, ALPHA, LIMIT)
    tolerance = 1e-6 if dtype == torch.float32 else ROUNDED
    assert relative_error(hidden, expected.detach()) < tolerance
    assert relative_error(found, d_y) < tolerance
    products = d_hidden.double() * expected.detach()
    # Beside the terms of the sum, which may cancel.
    assert ((d_score[:, 0].double() - products.sum(1)).abs() <= 1e-5 * products.abs().sum(1)).all()


@DTYPES
def test_the_activation_is_exact_where_its_exponential_ends(dtype: torch.dtype) -> None:
    native = library(dtype)
    gates = torch.tensor([-1e30, -200.0, -90.0, -60.0, -51.0, 0.0, 1e30, torch.inf]).repeat(4)
    y = torch.stack([gates, torch.ones(32)], 1).view(1, 64)
    hidden = native.activate(y, torch.empty(1, 32, dtype=dtype), ALPHA, LIMIT)
    expected = clamped_swiglu(y.double(), ALPHA, LIMIT)
    assert torch.allclose(hidden.double(), expected, rtol=ROUNDED, atol=1e-30)


@DTYPES
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    native = library(dtype)
    y = torch.zeros(1, 64)
    y[0, 4] = y[0, 9] = torch.nan  # a gate and an up
    hidden = native.activate(y, torch.empty(1, 32, dtype=dtype), ALPHA, LIMIT)
    d_y = torch.empty(1, 64, dtype=dtype)
    native.activate_back(y, torch.ones(1, 32), torch.ones(1, 1), d_y, ALPHA, LIMIT)
    assert hidden[0].isnan().nonzero().flatten().tolist() == [2, 4]
    assert d_y[0, 4:6].isnan().all() and d_y[0, 8].isnan() and not d_y[0, 10:].isnan().any()


def test_tensors_with_gaps_are_refused() -> None:
    native, (parts, _) = library(torch.float32), parts_of([3])
    blocks, scales = packed(1, 64, 64)
    with pytest.raises(ValueError, match="rows has to be contiguous"):
        native.multiply(parts, blocks, scales, random(64, 3).t(), torch.empty(3, 64), low=None, factor=None)
