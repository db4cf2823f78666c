"""What large matrices ask of a CPU: the faster library for their products, and memory that is given back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Large enough that PyTorch hands a product of such matrices to oneDNN.
_SIDE = 256
# bfloat16 rounds it to 1.
_NEEDS_FLOAT32 = 1 + 2**-12


@contextmanager
def quick_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on a CPU where it keeps all of their digits.

    PyTorch has MKL multiply them unless bfloat16's precision is allowed. oneDNN makes use of that only on
    processors with units for bfloat16 matrices; on others it multiplies in float32, on AMD's about twice as
    fast as MKL.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        if not _exact():
            matmul.fp32_precision = before
        yield
    finally:
        matmul.fp32_precision = before


def _exact() -> bool:
    some = torch.full((_SIDE, _SIDE), _NEEDS_FLOAT32)
    return bool((some @ some.mT)[0, 0] / _SIDE - 1 > 2**-12)


def return_freed_memory() -> None:
    """Give the system what tensors have left; glibc keeps pieces of up to 32 MB, and ever more of them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
