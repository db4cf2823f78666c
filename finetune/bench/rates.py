"""What this machine's processor does a second, measured in a moment: `python -m finetune.bench.rates`.

Products and decoding go through more weights than a cache holds, as training does. A rate is the best of some
tries, as what else runs on the machine can only slow one down.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

from finetune.model.mxfp4 import dequantise_mxfp4

TRIES = 8
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
# An expert's share of a step, and matrices such as an expert has.
ROWS, INPUTS, OUTPUTS = 256, 1024, 2048
# Larger than the caches of a processor's share of cores.
BYTES = 1 << 26
# finetune/model/cpu_settings.py: 2048 x 1024 logits in float32.
TILE = 1 << 23
# What a group of experts decodes at once (finetune/model/experts.py).
DECODED = 1 << 22


def best_seconds(work: Callable[[], object], times: int = 1) -> float:
    """Seconds that `work` takes at best, in runs of `times` calls."""
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(times):
            work()
        seconds.append((time.perf_counter() - began) / times)
    return min(seconds)


def measure() -> dict[str, object]:
    """Rates of products and attention (FLOP/s), memory (bytes/s), decoding (weights/s); seconds of a call."""
    torch.manual_seed(0)
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "matrix": {name: _matrix(dtype) for name, dtype in DTYPES.items()},
        "attention": {name: _attention(dtype) for name, dtype in DTYPES.items()},
        "bandwidth": _bandwidth(),
        "fresh": _fresh(),
        "decode": {name: _decode(dtype) for name, dtype in DTYPES.items()},
        "call": {name: _call(dtype) for name, dtype in DTYPES.items()},
    }


def _matrix(dtype: torch.dtype) -> float:
    """Forward, and back to the gradient of the rows."""
    count = max(2, BYTES // (INPUTS * OUTPUTS * dtype.itemsize))
    weights = cycle([torch.randn(OUTPUTS, INPUTS, dtype=dtype) for _ in range(count)])
    rows, out = torch.randn(ROWS, INPUTS, dtype=dtype), torch.empty(ROWS, OUTPUTS, dtype=dtype)
    back = torch.empty_like(rows)

    def there_and_back() -> None:
        matrix = next(weights)
        torch.mm(rows, matrix.t(), out=out)
        torch.mm(out, matrix, out=back)

    return 4 * ROWS * INPUTS * OUTPUTS / best_seconds(there_and_back, times=4)


def _attention(dtype: torch.dtype) -> float:
    """Scores of a block of queries: a product, float32, mask, exponential, and a product again."""
    heads, queries, keys, size = 4, 512, 512, 64
    query = torch.randn(1, heads, queries, size, dtype=dtype)
    key = torch.randn(1, heads, keys, size, dtype=dtype)
    hidden = torch.zeros(queries, keys, dtype=torch.bool)

    def block() -> torch.Tensor:
        scores = (query @ key.transpose(-1, -2)).float().mul_(0.125).masked_fill_(hidden, -1.0)
        return scores.sub_(scores.logsumexp(-1, keepdim=True)).exp_().to(dtype) @ key

    return 4 * heads * queries * keys * size / best_seconds(block, times=4)


def _bandwidth() -> float:
    """Of values as many as a tile of logits has, which is also what rows of an expert are."""
    values = torch.ones(TILE // 4)
    return 2 * TILE / best_seconds(lambda: values.mul_(1.0), times=4)


def _fresh() -> float:
    return BYTES / best_seconds(lambda: torch.empty(BYTES // 4).fill_(1.0))


def _decode(dtype: torch.dtype) -> float:
    blocks = cycle([torch.randint(0, 256, (1, 1, DECODED // 32, 16), dtype=torch.uint8) for _ in range(8)])
    scales = torch.randint(120, 128, (1, 1, DECODED // 32), dtype=torch.uint8)
    out = torch.empty(1, 1, DECODED, dtype=dtype)
    return DECODED / best_seconds(lambda: dequantise_mxfp4(next(blocks), scales, dtype, out=out), times=2)


def _call(dtype: torch.dtype) -> float:
    rows, out = torch.ones(8, 32, dtype=dtype), torch.empty(8, 32, dtype=dtype)
    matrix = torch.ones(32, 32, dtype=dtype)
    return best_seconds(lambda: torch.mm(rows, matrix, out=out), times=300)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "this processor")


if __name__ == "__main__":
    print(json.dumps(measure()))
