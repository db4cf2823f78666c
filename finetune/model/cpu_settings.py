"""Settings of the libraries that make work on CPUs smaller or faster and change no result."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Tokens and entries of the vocabulary that the output head scores at once. TRL's own 4096 x 32768 suit a
# kernel that needs nothing beside the tile; on CPUs it works with some seven temporary copies in float32.
HEAD_TOKENS, HEAD_VOCABULARY = 2048, 1024
# Names of <malloc.h>. From MAPPED on, the largest threshold that glibc takes, blocks are mapped one by one;
# KEPT is more than a heap has.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED, KEPT = 32 << 20, (1 << 31) - 1


def ask_for_large_pages() -> None:
    """Have torch take its larger tensors in pages of 2 MB; to be called before torch is imported.

    Aligned so, memory that one tensor left fits the next, where small pages leave gaps between: a step of
    2048 tokens (hidden 1024, 4 layers, float32) peaks at 0.95 instead of 1.1 GB, at the same speed.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def score_in_small_tiles() -> None:
    """Let TRL's output head work on tiles whose temporary copies are small."""
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE = HEAD_TOKENS
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_VOCABULARY


def multiply_float32_fast() -> None:
    """Let oneDNN multiply float32 matrices on a CPU where it keeps all of their digits.

    PyTorch has MKL multiply them unless bfloat16's precision is allowed. oneDNN makes use of that only on
    processors with units for bfloat16 matrices; on others it multiplies in float32, on AMD's about twice as
    fast as MKL.
    """
    import torch

    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    # Of a size that PyTorch hands to oneDNN, and of a value that bfloat16 would round to 1.
    some = torch.full((256, 256), 1 + 2**-12)
    if not bool((some @ some.mT)[0, 0] / 256 - 1 > 2**-12):
        matmul.fp32_precision = before


@contextmanager
def fast_float32() -> Iterator[None]:
    """`multiply_float32_fast` until the block ends."""
    import torch

    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        multiply_float32_fast()
        yield
    finally:
        matmul.fp32_precision = before


def keep_freed_memory() -> None:
    """Have glibc keep what tensors of up to 32 MB leave at the end of its heap: the next step needs it again.

    Given back and taken anew, its pages are cleared each time: steps of small models take a tenth longer. The
    peak is the same.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def return_freed_memory() -> None:
    """Give the system what tensors have left; glibc keeps pieces of up to 32 MB, and ever more of them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
