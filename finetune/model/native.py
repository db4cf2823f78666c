"""MXFP4 decoded in one pass: a look-up in a register, which torch has no operation for.

The sixteen values under a block's scale fit one vector register, and one instruction looks up 16 or 32 codes
in it. That takes a tenth of the time of torch's operations, which pass over the weights three times. The
system's C compiler makes a library of it, once, in the user's cache; without a compiler or a processor with
AVX-512 there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#define AVX512 __attribute__((target("avx512f,avx512bw")))

int supported(void) { return __builtin_cpu_supports("avx512bw"); }

/* blocks [count, 16], scales [count], values [256, 32]: of each scale the 16 values, twice
   -> out [count, 32] */

AVX512 void decode_bfloat16(const uint8_t *blocks, const uint8_t *scales, const uint16_t *values,
                            uint16_t *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(blocks + 16 * i)));
    /* Each byte's low code comes to lie in the low half of 32 bits, its high code in the high half. The
       look-up regards five bits of a half, of which the fifth chooses between two equal tables. */
    __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    __m512i table = _mm512_loadu_si512(values + 32 * scales[i]);
    _mm512_storeu_si512(out + 32 * i, _mm512_permutexvar_epi16(codes, table));
  }
}

AVX512 void decode_float32(const uint8_t *blocks, const uint8_t *scales, const float *values,
                           float *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    __m128i low = _mm_loadu_si128((const void *)(blocks + 16 * i)), high = _mm_srli_epi16(low, 4);
    __m512 table = _mm512_loadu_ps(values + 32 * scales[i]);
    /* The look-up regards four bits. */
    __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
    __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high));
    _mm512_storeu_ps(out + 32 * i, _mm512_permutexvar_ps(first, table));
    _mm512_storeu_ps(out + 32 * i + 16, _mm512_permutexvar_ps(second, table));
  }
}
"""

# Blocks, scales, the values of every scale, out.
Decode = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@cache
def native_decoder(dtype: torch.dtype) -> Decode | None:
    """For contiguous tensors on the CPU; FINETUNE_NATIVE=0 in the environment forbids it."""
    compiler, kinds = shutil.which("cc"), {torch.bfloat16: "bfloat16", torch.float32: "float32"}
    if compiler is None or dtype not in kinds or os.environ.get("FINETUNE_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    if not library.supported():
        return None
    function = library[f"decode_{kinds[dtype]}"]

    def decode(blocks: Tensor, scales: Tensor, values: Tensor, out: Tensor) -> None:
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (blocks, scales, values, out)]
        function(*places, ctypes.c_int64(scales.numel()))

    return decode


def _compiled(compiler: str) -> Path:
    """The library, made where it is not there yet; several processes may do so at once."""
    folder = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"
    )
    library = Path(folder) / f"decode-{hashlib.sha256(SOURCE.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as made:
            fresh = Path(made) / library.name
            command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(fresh)]
            subprocess.run(command, input=SOURCE.encode(), capture_output=True, check=True, timeout=60)
            fresh.replace(library)
    return library
