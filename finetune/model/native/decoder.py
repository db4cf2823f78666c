"""MXFP4 decoded by the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from finetune.model.native import load_library

# Blocks, scales, the values of every scale, out.
Decode = Callable[[Tensor, Tensor, Tensor, Tensor], None]
# The dtypes that there are functions for, as these are named.
KINDS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@cache
def native_decoder(dtype: torch.dtype) -> Decode | None:
    """For contiguous tensors on the CPU."""
    library = load_library("decode") if dtype in KINDS else None
    if library is None or not library.decodes():
        return None
    function = library[f"decode_{KINDS[dtype]}"]

    def decode(blocks: Tensor, scales: Tensor, values: Tensor, out: Tensor) -> None:
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (blocks, scales, values, out)]
        function(*places, ctypes.c_int64(scales.numel()))

    return decode
