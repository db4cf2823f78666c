"""How many rows products are made with, where that number should be one of few."""

from __future__ import annotations

import torch
from torch import Tensor

# Sizes are no further apart than this: a step of 256 tokens pays for an eighth more at most.
FURTHEST = 32


def padded(count: int, like: Tensor, unit: int = 1) -> int:
    """`count`, or, where products of tensors `like` this one are oneDNN's, the next of few sizes in units.

    For bfloat16 on CPUs with AVX-512 oneDNN 3.12 compiles a program for every number of rows, and keeps 0.6
    MiB for each, 0.4 of it whatever ONEDNN_PRIMITIVE_CACHE_CAPACITY says. Two sizes to an octave (1, 2, 3, 4,
    6, 8, 12, ...) leave few of them.
    """
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return count
    count = -(-count // unit)
    step = min(FURTHEST, 1 << max(0, (count - 1).bit_length() - 2))
    return -(-count // step) * step * unit
