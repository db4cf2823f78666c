"""Rates that decide between designs: decoding, grouped products by rows an expert, attention.

    python -m tests.gpu.rates [--device cpu]

Prints JSON. With few rows an expert, grouped products wait for decoding: docs/gpu.md says from which rate on
a kernel that decodes as it multiplies would win.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from finetune.model.attention import Packing, attend_packed
from finetune.model.kernels.products import multiply
from finetune.model.kernels.steps import steps_for
from tests.gpu.models import random_experts


def seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Median of some runs after two to warm up."""
    found = []
    for _ in range(times + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def decoding(device: torch.device, size: str) -> dict[str, float]:
    """GB/s of bytes read and written, 16 experts of one projection at once."""
    experts, steps = random_experts(size, device), steps_for(device, torch.bfloat16)
    count = min(16, experts.num_experts)
    blocks, scales = (experts.get_parameter(f"gate_up_proj{part}")[:count] for part in ("", "_scales"))
    out = torch.empty(*scales.shape[:2], scales.shape[2] * 32 + 24, dtype=torch.bfloat16, device=device)
    moved = blocks.numel() + scales.numel() + blocks.numel() * 2 * 2
    return {"gb_per_second": moved / seconds(lambda: steps.decode(blocks, scales, out), device) / 1e9}


def products(device: torch.device, hidden: int, experts: int) -> dict[str, dict[str, float]]:
    """TFLOP/s of the widened up projection, forward and backward, by rows an expert."""
    width, out = hidden + 24, 2 * hidden
    weights = torch.randn(experts, out, width, device=device).bfloat16()
    found = {}
    for each in (128, 256, 512, 1024, 4096) if device.type == "cuda" else (8,):
        rows = torch.randn(experts * each, width, device=device).bfloat16()
        d_out = torch.randn(experts * each, out, device=device).bfloat16()
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * each
        work = 2 * experts * each * width * out / 1e12
        forward = seconds(partial(multiply, rows, weights.transpose(1, 2), ends), device)
        backward = seconds(partial(multiply, d_out, weights, ends), device)
        found[str(each)] = {"forward": work / forward, "backward": work / backward}
    return found


def attention(device: torch.device, length: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a layer of one document, forward and backward, with and without a window."""
    heads, key_heads, size = (64, 8, 64) if device.type == "cuda" else (4, 2, 8)
    shapes = (1, heads, length, size), (1, key_heads, length, size), (1, key_heads, length, size), (heads,)
    inputs = [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]
    query, key, value, sinks = inputs
    packing = Packing(torch.arange(length, device=device).unsqueeze(0), 128)
    found = {}
    for window in (None, 128):
        forward = partial(attend_packed, query, key, value, sinks, packing, window, size**-0.5)
        both = partial(_forward_and_backward, forward, inputs, torch.randn_like(query))
        found[f"window {window}"] = {
            "forward_ms": seconds(forward, device) * 1e3, "both_ms": seconds(both, device) * 1e3
        }  # fmt: skip
    return found


def _forward_and_backward(
    forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], d_out: torch.Tensor
) -> None:
    torch.autograd.grad(forward(), inputs, d_out)


def measure(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "decoding": decoding(device, "20b" if cuda else "tiny"),
        "products": products(device, *((2880, 16) if cuda else (64, 4))),
        "attention": attention(device, 8192 if cuda else 256),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    print(json.dumps(measure(torch.device(parser.parse_args().device))))


if __name__ == "__main__":
    main()
