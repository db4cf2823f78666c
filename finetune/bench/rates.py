"""What this machine's processor does a second, measured in a moment: `python -m finetune.bench.rates`.

Each rate is the best of a few tries: what else runs on the machine only ever slows one down.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.model.mxfp4 import dequantise_mxfp4

TRIES = 4
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
# Large enough to fill the cores, small enough to take some milliseconds.
ROWS, INPUTS, OUTPUTS = 512, 2048, 2048
# Larger than any cache.
BYTES = 1 << 26


def best(work: Callable[[], object], times: int = 1) -> float:
    """Seconds that `work` takes at best, of runs of `times` calls."""
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(times):
            work()
        seconds.append((time.perf_counter() - began) / times)
    return min(seconds)


def measure() -> dict[str, object]:
    """Rates of products (FLOP/s), memory (bytes/s), decoding (weights/s) and a small operation (s)."""
    torch.manual_seed(0)
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "matrix": {name: _matrix(dtype) for name, dtype in DTYPES.items()},
        "attention": {name: _attention(dtype) for name, dtype in DTYPES.items()},
        "bandwidth": _bandwidth(),
        "fresh": _fresh(),
        "decode": {name: _decode(dtype) for name, dtype in DTYPES.items()},
        "call": _call(),
    }


def _matrix(dtype: torch.dtype) -> float:
    rows, weights = torch.randn(ROWS, INPUTS, dtype=dtype), torch.randn(OUTPUTS, INPUTS, dtype=dtype)
    out = torch.empty(ROWS, OUTPUTS, dtype=dtype)
    return 2 * ROWS * INPUTS * OUTPUTS / best(lambda: torch.mm(rows, weights.t(), out=out))


def _attention(dtype: torch.dtype) -> float:
    """Scores of a block of queries: a product, its float32 copy, mask, exponential, and a product again."""
    heads, group, keys, size = 8, 512, 1024, 64
    query = torch.randn(1, heads, group, size, dtype=dtype)
    key = torch.randn(1, heads, keys, size, dtype=dtype)
    hidden = torch.zeros(group, keys, dtype=torch.bool)

    def block() -> torch.Tensor:
        scores = (query @ key.transpose(-1, -2)).float().mul_(0.125).masked_fill_(hidden, -1.0)
        return scores.sub_(scores.logsumexp(-1, keepdim=True)).exp_().to(dtype) @ key

    return 2 * 2 * heads * group * keys * size / best(block)


def _bandwidth() -> float:
    values = torch.ones(BYTES // 4)
    return 2 * BYTES / best(lambda: values.mul_(1.0))


def _fresh() -> float:
    return BYTES / best(lambda: torch.empty(BYTES // 4).fill_(1.0))


def _decode(dtype: torch.dtype) -> float:
    out_features, in_blocks = 1024, 64
    blocks = torch.randint(0, 256, (1, out_features, in_blocks, 16), dtype=torch.uint8)
    scales = torch.randint(120, 128, (1, out_features, in_blocks), dtype=torch.uint8)
    out = torch.empty(1, out_features, in_blocks * 32, dtype=dtype)
    return out.numel() / best(lambda: dequantise_mxfp4(blocks, scales, dtype, out=out))


def _call() -> float:
    small = torch.ones(8)
    return best(lambda: small.add_(1.0), times=1000)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "this processor")


if __name__ == "__main__":
    print(json.dumps(measure()))
