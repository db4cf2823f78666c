"""What torch has no operation for on processors with AVX-512, in C: MXFP4 decoded, and multiplied as it is.

The system's C compiler makes libraries of it, once, in the user's cache; without a compiler or such a
processor there are none, and torch's operations do the work.
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

# Blocks, scales, the values of every scale, out.
Decode = Callable[[Tensor, Tensor, Tensor, Tensor], None]
# The dtypes that there are functions for, as these are named.
KINDS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@cache
def native_decoder(dtype: torch.dtype) -> Decode | None:
    """For contiguous tensors on the CPU; FINETUNE_NATIVE=0 in the environment forbids it."""
    library = load_library("decode") if dtype in KINDS else None
    if library is None or not library.decodes():
        return None
    function = library[f"decode_{KINDS[dtype]}"]

    def decode(blocks: Tensor, scales: Tensor, values: Tensor, out: Tensor) -> None:
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (blocks, scales, values, out)]
        function(*places, ctypes.c_int64(scales.numel()))

    return decode


def load_library(name: str) -> ctypes.CDLL | None:
    """The library of `name`.c; none where it is forbidden or cannot be made."""
    compiler = shutil.which("cc")
    if compiler is None or os.environ.get("FINETUNE_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, name)))
    except (OSError, subprocess.SubprocessError):
        return None


def _compiled(compiler: str, name: str) -> Path:
    """The library, made where it is not there yet; several processes may do so at once."""
    folder = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"
    )
    source = Path(__file__).with_name(f"{name}.c")
    code = source.read_bytes() + source.with_name("vectors.h").read_bytes()
    library = Path(folder) / f"{name}-{hashlib.sha256(code).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as made:
            fresh = Path(made) / library.name
            command = [compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(fresh)]
            subprocess.run(command, capture_output=True, check=True, timeout=60)
            fresh.replace(library)
    return library
