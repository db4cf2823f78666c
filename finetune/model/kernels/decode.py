"""MXFP4 to bfloat16 in Triton, streaming: every byte is read once and every weight written once.

The bytes of a block meet the registers as 32-bit integers, so that a thread turns each into eight weights:
16 bytes, which is what it can store at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.model.layout import BLOCK

# Blocks of 32 weights a program decodes: 2,176 bytes in, 8,192 out, which keeps the registers of a thread
# below 40 and gives an H200 some 30,000 programs for 16 experts of gpt-oss.
BLOCKS_PER_PROGRAM = 128


@triton.jit
def decode_kernel(
    words, scales, out, block_count, blocks_per_row, row_eights,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """`words [block_count, 4]` int32 and `scales [block_count]` uint8 -> `out [rows, 8 * row_eights]`.

    A row has `blocks_per_row` blocks; its further columns are left alone.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < block_count
    words += block.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    word = tl.load(words, mask=there[:, None], other=0)
    code = word[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]  # [BLOCKS, 4, 8], in the low four bits
    # Where a float32 has its sign, the last two bits of its exponent and the first of its mantissa: the value
    # times 2 ** -126, which for 0.5 is a subnormal number. Triton's products keep those.
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    scale = tl.load(scales + block, mask=there, other=127).to(tl.int32)
    # 2 ** -127 is subnormal, too, and 255 stands for NaN.
    factor_bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
    factor = factor_bits.to(tl.float32, bitcast=True)
    weight = (value * factor[:, None, None]).to(out.dtype.element_ty)
    row = block // blocks_per_row
    begin = row.to(tl.int64) * (row_eights * 8) + (block - row * blocks_per_row) * 32
    column = (8 * tl.arange(0, 4))[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out + begin[:, None, None] + column[None, :, :], weight, mask=there[:, None, None])


def decode(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """`blocks [g, rows, in/32, 16]` and `scales [g, rows, in/32]`, contiguous uint8, into `out [g, rows, W]`.

    `out` is contiguous; its columns from `in` on are left alone. Exact in bfloat16 and float32.
    """
    words = blocks.reshape(-1).view(torch.int32)
    block_count, blocks_per_row = scales.numel(), scales.shape[-1]
    assert blocks.numel() == block_count * BLOCK // 2 and out.is_contiguous()
    grid = (triton.cdiv(block_count, BLOCKS_PER_PROGRAM),)
    decode_kernel[grid](
        words, scales, out, block_count, blocks_per_row, out.shape[-1] // 8, BLOCKS=BLOCKS_PER_PROGRAM
    )
