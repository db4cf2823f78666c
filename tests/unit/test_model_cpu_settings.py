"""Settings for CPUs make products faster and leave them as exact as they were."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from finetune.model.cpu_settings import fast_float32

PRODUCTS = {
    "rows": lambda x, w: x @ w,
    "transposed": lambda x, w: x @ w.t().contiguous().t(),
    "gradient": lambda x, w: x.t().contiguous().t() @ w,
    "linear": lambda x, w: torch.nn.functional.linear(x, w.t()),
    "batched": lambda x, w: (x.expand(3, *x.shape) @ w.expand(3, *w.shape))[1],
    "out": lambda x, w: torch.mm(x, w, out=torch.empty(x.shape[0], w.shape[1])),
    "added": lambda x, w: torch.addmm(torch.zeros(w.shape[1]), x, w),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
@pytest.mark.parametrize(
    "shape", [(1, 512, 96), (7, 256, 1024), (64, 64, 640), (300, 1024, 8), (513, 65, 33)]
)
def test_float32_products_keep_their_digits(product: object, shape: tuple[int, int, int]) -> None:
    n, k, m = shape
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(n, k, generator=random), torch.randn(k, m, generator=random)
    with fast_float32():
        found: Tensor = product(x, w)  # type: ignore[operator]
    exact = x.double() @ w.double()
    # What float32 sums of k products are off by; bfloat16's digits would miss by a thousand times as much.
    assert (found.double() - exact).abs().max() < 4e-6 * exact.abs().max()


def test_the_setting_ends_with_its_block() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert matmul.fp32_precision == before


FAULTS_OF_A_STEP = """
import resource, sys, torch
from finetune.model.cpu_settings import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 21) for _ in range(4)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_kept_is_not_cleared_again_at_every_step() -> None:
    # Left to itself, glibc gives such tensors back or not, as the heap happens to lie.
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    program = [sys.executable, "-c", FAULTS_OF_A_STEP]
    faults = {
        how: int(subprocess.check_output([*program, how], text=True, env=given_back))
        for how in ("keep", "return")
    }
    assert faults["keep"] < 0.1 * faults["return"]
