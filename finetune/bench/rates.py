"""What this machine's processor does a second, measured in moments: `python -m finetune.bench.rates bf16`.

A rate is the best of some tries, as what else runs on the machine can only slow one down.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

from finetune.bench.probes import DTYPES, prices

TRIES = 8
# An expert's share of a step, and matrices such as an expert has.
ROWS, INPUTS, OUTPUTS = 256, 1024, 2048
# Larger than the caches of a processor's share of cores.
BYTES = 1 << 28


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


def measure(dense: str) -> dict[str, object]:
    """Rates of products (FLOP/s) and memory (bytes/s); seconds of the units of a training step in `dense`."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "matrix": {name: _matrix(dtype) for name, dtype in DTYPES.items()},
        "bandwidth": _bandwidth(),
        "prices": {dense: prices(dense)},
    }


def _matrix(dtype: torch.dtype) -> float:
    """Forward, and back to the gradient of the rows; through more weights than a cache holds."""
    count = max(2, BYTES // 4 // (INPUTS * OUTPUTS * dtype.itemsize))
    weights = cycle([torch.randn(OUTPUTS, INPUTS, dtype=dtype) for _ in range(count)])
    rows, out = torch.randn(ROWS, INPUTS, dtype=dtype), torch.empty(ROWS, OUTPUTS, dtype=dtype)
    back = torch.empty_like(rows)

    def there_and_back() -> None:
        matrix = next(weights)
        torch.mm(rows, matrix.t(), out=out)
        torch.mm(out, matrix, out=back)

    return 4 * ROWS * INPUTS * OUTPUTS / best_seconds(there_and_back, times=4)


def _bandwidth() -> float:
    values = torch.ones(BYTES // 4)
    return 2 * BYTES / best_seconds(lambda: values.mul_(1.0))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "this processor")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
