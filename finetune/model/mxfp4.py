"""MXFP4, the number format of the released experts: blocks of 32 values of 4 bits that share a power of two.

A tensor `[..., out, in]` is stored as `blocks [..., out, in/32, 16]` (uint8, two E2M1 codes a byte, low
nibble first) and `scales [..., out, in/32]` (uint8, E8M0: 2 ** (scale - 127)).
Format: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2, 5.4 and 6.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from finetune.model.layout import BLOCK
from finetune.model.native.decoder import native_decoder

SCALE_BIAS = 127
# E2M1 by code: sign, two bits of exponent, one of mantissa.
CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST_EXPONENT = 2  # of 6.0 = 1.5 * 2**2
# Weights decoded in one go: the look-up indices (4 bytes for 4 weights) and the result then stay in a core's
# cache. Fastest of 2**16 .. 2**24 on a 2-core Zen 5, by a factor of 1.3 over whole experts.
CHUNK_WEIGHTS = 3 << 18

# One look-up moves the values of one or two bytes at once, seen as one number of their joint size.
_WIDE = {
    torch.bfloat16: (torch.uint16, torch.int64),
    torch.float32: (torch.uint16, torch.complex128),
    torch.float64: (torch.uint8, torch.complex128),
}


@cache
def _value_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of every byte or pair of bytes, `[256 or 65536]`, each entry 2 or 4 values of `dtype`."""
    word, wide = _WIDE[dtype]
    codes_per_word = 2 * word.itemsize
    words = torch.arange(1 << 4 * codes_per_word, device=device)
    nibbles = torch.stack([words >> 4 * place & 15 for place in range(codes_per_word)], dim=-1)
    values = torch.tensor(CODE_VALUES, dtype=dtype, device=device)
    return values[nibbles].view(wide).squeeze(-1)


@cache
def _scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """2 ** (scale - 127) for every scale byte, `[256]`; 255 stands for NaN."""
    exponents = torch.arange(256, dtype=torch.float64, device=device) - SCALE_BIAS
    table = torch.exp2(exponents)
    table[255] = torch.nan
    return table.to(dtype)


@cache
def values_of_scales(dtype: torch.dtype) -> Tensor:
    """For native code: of every scale the sixteen values, twice, `[256, 32]`."""
    codes = torch.tensor(CODE_VALUES, dtype=dtype).repeat(2)
    return codes * _scale_table(dtype, torch.device("cpu")).unsqueeze(1)


def dequantise_mxfp4(
    blocks: Tensor, scales: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Decode to `[..., out, in]` in bfloat16, float16, float32 or float64; exact where `dtype` can hold it.

    `blocks [..., out, in/32, 16]` and `scales [..., out, in/32]` are contiguous uint8. `out` is a
    contiguous tensor to write into: reusing one matters, since fresh memory costs more in page faults than
    the decoding itself.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    if dtype == torch.float16:  # which holds few of the scales, but may hold their products
        return out.copy_(dequantise_mxfp4(blocks, scales, torch.float32))
    if blocks.device.type == "cpu" and (decode := native_decoder(dtype)):
        # The view refuses an `out` of another size or layout, into which the library would write blindly.
        decode(
            blocks.contiguous(),
            scales.contiguous(),
            values_of_scales(dtype),
            out.view(scales.numel(), BLOCK),
        )
        return out
    table = _value_table(dtype, blocks.device)
    scale_of = _scale_table(dtype, blocks.device)
    words = blocks.contiguous().view(-1).view(_WIDE[dtype][0])
    words_per_block = words.numel() // max(1, scales.numel())
    factors = torch.index_select(scale_of, 0, scales.contiguous().view(-1).to(torch.int32)).unsqueeze(-1)
    wide = out.view(-1).view(table.dtype)
    per_block = out.view(-1, BLOCK)
    blocks_at_once = max(1, CHUNK_WEIGHTS // BLOCK)
    for first in range(0, factors.numel(), blocks_at_once):
        last = first + blocks_at_once
        chunk = slice(first * words_per_block, last * words_per_block)
        torch.index_select(table, 0, words[chunk].to(torch.int32), out=wide[chunk])
        per_block[first:last].mul_(factors[first:last])
    return out


@cache
def _midpoints(device: torch.device) -> Tensor:
    """Where nearest rounding goes from one magnitude to the next; a tie goes to the even code."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    # bucketize sends a tie down; for odd lower codes it must go up, so their boundary moves down by
    # one float32 step.
    ties_up = torch.tensor([False, True, False, True, False, True, False], device=device)
    return torch.where(ties_up, torch.nextafter(middles, torch.zeros_like(middles)), middles)


def _nearest_codes(values: Tensor) -> Tensor:
    """E2M1 codes (uint8) nearest to float32 `values`; magnitudes over 6 become 6."""
    magnitude = torch.bucketize(values.abs(), _midpoints(values.device)).to(torch.uint8)
    return magnitude | (torch.signbit(values).to(torch.uint8) << 3)


def quantise_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weights [..., out, in]` (in a multiple of 32) to blocks `[..., out, in/32, 16]` and scales.

    Of the two powers of two that can serve a block (the specification's, which clips values over 6, and
    the next one up, which is coarser) the one with the smaller squared error is taken. Values that MXFP4
    holds exactly are kept.
    """
    groups = weights.detach().to(torch.float32).unflatten(-1, (-1, BLOCK))  # [..., out, in/32, 32]
    largest = groups.abs().amax(dim=-1)
    # frexp gives an exact exponent where log2 could round up at powers of two; zero blocks take the
    # smallest scale.
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT, -SCALE_BIAS)
    exponent = exponent.clamp(min=-SCALE_BIAS)
    unit = torch.exp2(exponent.to(torch.float64)).to(torch.float32)
    # In units of the finer scale, so that no error overflows or underflows.
    scaled = groups / unit.unsqueeze(-1)
    values = torch.tensor(CODE_VALUES, device=groups.device)
    fine, coarse = _nearest_codes(scaled), _nearest_codes(scaled / 2)
    fine_error = (values[fine.int()] - scaled).square().sum(-1)
    coarse_error = (2 * values[coarse.int()] - scaled).square().sum(-1)
    up = coarse_error < fine_error
    codes = torch.where(up.unsqueeze(-1), coarse, fine)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponent + up + SCALE_BIAS).to(torch.uint8)
