"""What torch has no operation for on processors with AVX-512, in C: MXFP4 decoded, and multiplied as it is.

The system's C compiler makes libraries of it, once, in the user's cache; without a compiler or such a
processor there are none, and torch's operations do the work. FINETUNE_NATIVE=0 in the environment forbids
them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def multiplies(kind: str) -> bool:
    """Whether native products are this processor's fastest in `bfloat16` or `float32`."""
    products = load_library("products")
    return products is not None and bool(products[f"multiplies_{kind}"]())


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
