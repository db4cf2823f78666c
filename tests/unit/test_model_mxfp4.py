"""MXFP4: decoding is the format's definition, rounding is to nearest."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.model import mxfp4
from finetune.model.mxfp4 import dequantise_mxfp4, quantise_mxfp4
from finetune.model.native.decoder import native_decoder
from tests.model_kit import decode_by_definition

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


@pytest.fixture(autouse=True, params=["native", "torch"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of decoding keep the same promises."""
    if request.param == "torch":
        monkeypatch.setattr(mxfp4, "native_decoder", lambda dtype: None)
    elif native_decoder(torch.bfloat16) is None:
        pytest.skip("no C compiler, or no AVX-512")


def every_byte_with_every_scale() -> tuple[Tensor, Tensor]:
    """Blocks `[256, 16, 16]` and scales `[256, 16]`: row s holds all 256 bytes under scale s."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()
    return blocks, scales


def random_blocks(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
    return blocks, torch.randint(100, 150, shape, generator=random, dtype=torch.uint8)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal, with NaN equal to NaN and -0.0 apart from 0.0."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    numbers = ~found.isnan()
    assert torch.equal(found.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_with_every_scale_decodes_to_its_definition(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_with_every_scale()
    # The definition is exact in float64; what a narrower dtype cannot hold is rounded once.
    assert_same_bits(dequantise_mxfp4(blocks, scales, dtype), decode_by_definition(blocks, scales).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_under_scale_255_is_nan_and_its_neighbours_are_not(dtype: torch.dtype) -> None:
    blocks, scales = random_blocks(1, 3)
    scales[0, 1] = 255
    values = dequantise_mxfp4(blocks, scales, dtype)[0].isnan().view(3, 32)
    assert values.all(1).tolist() == [False, True, False] and values.any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [32, 96, 1 << 20])
def test_chunks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(mxfp4, "CHUNK_WEIGHTS", chunk)
    blocks, scales = random_blocks(2, 5, 7)  # 70 blocks: not a whole number of chunks of three
    expected = decode_by_definition(blocks, scales).to(dtype)
    assert_same_bits(dequantise_mxfp4(blocks, scales, dtype), expected)


@pytest.mark.parametrize("blocks_over", [-1, 0, 1])
def test_tensors_around_the_size_of_a_chunk_decode_whole(blocks_over: int) -> None:
    blocks, scales = random_blocks(1, mxfp4.CHUNK_WEIGHTS // 32 + blocks_over)
    expected = decode_by_definition(blocks, scales).to(torch.bfloat16)
    assert torch.equal(dequantise_mxfp4(blocks, scales, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_into_a_given_tensor_fills_that_tensor_and_nothing_else(dtype: torch.dtype) -> None:
    blocks, scales = random_blocks(3, 2)
    buffer = torch.full((5, 64), 7, dtype=dtype)
    out = dequantise_mxfp4(blocks, scales, dtype, out=buffer[1:4])
    assert out.data_ptr() == buffer[1:4].data_ptr()
    assert torch.equal(buffer[1:4], decode_by_definition(blocks, scales).to(dtype))
    assert (buffer[0] == 7).all() and (buffer[4] == 7).all()


@pytest.mark.parametrize("out", [torch.zeros(2, 64), torch.zeros(64, 3).T], ids=["small", "transposed"])
def test_a_given_tensor_of_another_size_or_layout_is_refused(out: Tensor) -> None:
    with pytest.raises(RuntimeError):
        dequantise_mxfp4(*random_blocks(3, 2), torch.float32, out=out)


def test_a_slice_of_experts_decodes_as_in_the_whole() -> None:
    blocks, scales = random_blocks(6, 4, 3)
    whole = dequantise_mxfp4(blocks, scales, torch.float32)
    assert torch.equal(dequantise_mxfp4(blocks[2:5], scales[2:5], torch.float32), whole[2:5])


def test_no_experts_decode_to_nothing() -> None:
    blocks, scales = random_blocks(0, 4, 3)
    assert dequantise_mxfp4(blocks, scales, torch.float32).shape == (0, 4, 96)


def code_of(blocks: Tensor, position: int) -> int:
    """The code of one value of a single block `[1, 16]`: low nibble first."""
    return int(blocks[0, position // 2]) >> 4 * (position % 2) & 15


def squared_error(weights: list[float], scale: int) -> Fraction:
    """The least squared error a block can have under a scale."""
    unit = Fraction(2) ** (scale - 127)
    return sum((min(abs(abs(Fraction(w)) - m * unit) for m in MAGNITUDES) ** 2 for w in weights), Fraction(0))


def floats_of_any_size(least_exponent: int, largest_exponent: int) -> st.SearchStrategy[list[float]]:
    """32 float32 values within some powers of two of each other; many lie on ties."""
    value = st.one_of(
        st.integers(-32, 32).map(lambda n: n / 4),
        st.floats(-8, 8, width=32),
        st.floats(-0.25, 0.25, width=32),
    )
    values = st.lists(value, min_size=32, max_size=32)
    exponent = st.integers(least_exponent, largest_exponent)
    return st.builds(
        lambda xs, e: torch.tensor([math.ldexp(x, e) for x in xs], dtype=torch.float32).tolist(),
        values,
        exponent,
    )


@settings(max_examples=120, deadline=None)
@given(floats_of_any_size(-140, 124))
def test_every_weight_takes_the_nearest_code_of_its_blocks_scale_and_ties_go_to_even(
    weights: list[float],
) -> None:
    blocks, scales = quantise_mxfp4(torch.tensor([weights]))
    unit = Fraction(2) ** (int(scales[0, 0]) - 127)
    for position, weight in enumerate(weights):
        code = code_of(blocks[0], position)
        distances = [abs(abs(Fraction(weight)) - magnitude * unit) for magnitude in MAGNITUDES]
        nearest = [m for m, distance in enumerate(distances) if distance == min(distances)]
        expected = nearest[0] if len(nearest) == 1 else next(m for m in nearest if m % 2 == 0)
        assert code & 7 == expected
        assert bool(code & 8) == (math.copysign(1, weight) < 0)


@settings(max_examples=120, deadline=None)
@given(floats_of_any_size(-115, 122))
def test_of_the_specifications_scale_and_the_next_the_better_is_taken(weights: list[float]) -> None:
    _, scales = quantise_mxfp4(torch.tensor([weights]))
    chosen = int(scales[0, 0])
    largest = max(map(abs, weights))
    if largest == 0:
        return
    specified = max(0, math.frexp(largest)[1] - 1 - 2 + 127)
    assert chosen in (specified, specified + 1)
    best = min(squared_error(weights, specified), squared_error(weights, specified + 1))
    # The two errors are compared in float32, where nearly equal ones may change places.
    assert squared_error(weights, chosen) <= best * Fraction(100001, 100000)


def test_clipping_is_avoided_where_the_coarser_scale_is_better() -> None:
    weights = torch.full((1, 32), 7.9)  # 6 at scale 0, 8 at scale 1
    blocks, scales = quantise_mxfp4(weights)
    assert dequantise_mxfp4(blocks, scales, torch.float32)[0].unique().tolist() == [8.0]


@pytest.mark.parametrize("scale", [0, 1, 60, 127, 200, 252])
def test_values_that_the_format_holds_survive(scale: int) -> None:
    blocks, _ = random_blocks(64, 3, seed=scale)
    scales = torch.full((64, 3), scale, dtype=torch.uint8)
    weights = dequantise_mxfp4(blocks, scales, torch.float32)
    assert weights.isfinite().all()
    again = dequantise_mxfp4(*quantise_mxfp4(weights), torch.float32)
    assert_same_bits(again, weights)


def test_zeros_stay_zeros_and_get_a_scale_that_is_a_number() -> None:
    weights = torch.zeros(2, 64)
    weights[1] = -0.0
    blocks, scales = quantise_mxfp4(weights)
    assert (scales != 255).all()
    assert_same_bits(dequantise_mxfp4(blocks, scales, torch.float32), weights)


@pytest.mark.parametrize("size", [3.0e38, 2.0**120, 1e30, 1e-30, 2.0**-126])
def test_huge_and_tiny_weights_keep_their_size(size: float) -> None:
    weights = torch.tensor([[size, -size, size / 2, 0.0] * 8])
    blocks, scales = quantise_mxfp4(weights)
    error = (decode_by_definition(blocks, scales) - weights.double()).abs().max()
    # Half the widest step, from 4 to 6, over the smallest value that can be the largest of a block, 4.
    assert error / size <= 1 / 4


def test_the_smallest_float32_numbers_become_zero_under_the_smallest_scale() -> None:
    blocks, scales = quantise_mxfp4(torch.full((1, 32), 2.0**-149))
    assert scales.tolist() == [[0]] and decode_by_definition(blocks, scales).eq(0).all()


def test_blocks_are_rounded_one_by_one_in_any_shape() -> None:
    weights = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    blocks, scales = quantise_mxfp4(weights)
    assert blocks.shape == (3, 5, 2, 16) and scales.shape == (3, 5, 2)
    assert blocks.dtype == scales.dtype == torch.uint8
    alone_blocks, alone_scales = quantise_mxfp4(weights[2, 4:5, 32:])
    assert torch.equal(blocks[2, 4, 1], alone_blocks[0, 0]) and scales[2, 4, 1] == alone_scales[0, 0]


def test_bfloat16_weights_are_rounded_as_their_float32_values() -> None:
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for found, expected in zip(quantise_mxfp4(weights), quantise_mxfp4(weights.float()), strict=True):
        assert torch.equal(found, expected)
