"""The rows of the table: what is trained, under which limit, and what it is meant to reach.

    python -m tests.gpu.table ROW [--device cpu] [--profile]

runs one row, alone in its process, and prints its figures as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from finetune.model import add_lora
from finetune.model.recompute import keep_attention
from tests.gpu.models import random_model, take_the_gpu_path
from tests.gpu.steps import Stepper, with_fused_head
from tests.gpu.stock import stock_model

GB = 1e9


@dataclass(frozen=True)
class Row:
    """`limit`, `memory` in GB of 10**9 bytes; `speed` in tokens a second; `memory` and `speed` are goals."""

    size: str
    tokens: int
    document: int
    limit: float
    memory: float
    speed: float | None = None
    rank: int = 16
    optimizer: str = "adamw_8bit"
    nf4: bool = False
    experts_on_host: bool = False
    offload: bool = False
    checkpointing: bool = True
    keep_attention: int = 0
    stock: bool = False
    steps: int = 5
    warm_up: int = 2


K = 1024
WHOLE_CARD = 1e6  # no limit
# The most telling first: time may run out.
ROWS = {
    "20b, 8k context, 16k tokens": Row("20b", 16 * K, 8 * K, 80, 40, 18_000),
    "120b, 8k tokens": Row("120b", 8 * K, 8 * K, 80, 80, 9_000, nf4=True, optimizer="paged_adamw_8bit"),
    "20b, 16 GB card, 2k": Row("20b", 2 * K, 2 * K, 16, 15.5, rank=8, nf4=True),
    "20b, 24 GB card, 8k": Row("20b", 8 * K, 8 * K, 24, 23, nf4=True),
    "20b, stock transformers + PEFT": Row("20b", 8 * K, 8 * K, WHOLE_CARD, WHOLE_CARD, stock=True, steps=3),
    "20b, ours beside stock": Row("20b", 8 * K, 8 * K, WHOLE_CARD, WHOLE_CARD, steps=3),
    "20b, 128k context": Row(
        "20b", 128 * K, 128 * K, 80, 80, 5_000, nf4=True, keep_attention=4, steps=2, warm_up=1
    ),
    "120b, 32k tokens": Row(
        "120b", 32 * K, 8 * K, 80, 80, 12_000, nf4=True, optimizer="paged_adamw_8bit", offload=True, steps=3
    ),
    "120b, 24 GB card, experts on host": Row(
        "120b", 32 * K, 8 * K, 24, 22, 7_200, rank=8, nf4=True, experts_on_host=True, offload=True,
        optimizer="paged_adamw_8bit", steps=3, warm_up=2,
    ),
}  # fmt: skip


def for_trial(row: Row) -> Row:
    """The same at a size that a CPU takes in a moment; a stock model is small then anyway."""
    return replace(row, size="tiny", tokens=96, document=48, limit=WHOLE_CARD, rank=4, steps=2, warm_up=1)


def run(row: Row, device: torch.device, profile: bool = False) -> dict[str, Any]:
    """Train and measure; peak memory is what the allocator took from the card."""
    cuda = device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, row.limit * GB / total), device)
    torch.manual_seed(0)
    began = time.perf_counter()
    if row.stock:
        base = stock_model(row.size, device)
    else:
        base = random_model(row.size, device, nf4=row.nf4, experts_on_host=row.experts_on_host)
    head = with_fused_head(base)
    model = add_lora(base, rank=row.rank, alpha=2 * row.rank, targets=["attention", "experts"])
    model.train()
    keep_attention(model, row.keep_attention)
    if row.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    stepper = Stepper(model, row.tokens, row.document, row.optimizer, row.offload)
    made = time.perf_counter() - began
    losses, seconds = [], []
    for _ in range(row.warm_up + row.steps):
        start = time.perf_counter()
        losses.append(stepper())
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    pace = statistics.median(seconds[row.warm_up :])
    figures = {
        **asdict(row),
        "tokens_per_second": round(row.tokens / pace, 1),
        "seconds": [round(each, 4) for each in seconds],
        "making_the_model_seconds": round(made, 1),
        "losses": losses,
        "head": head,
        "optimizer_used": stepper.optimizer_name,
        "trained_parameters": sum(parameter.numel() for parameter in stepper.trained),
    }
    if cuda:
        figures["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved(device) / GB, 2)
        figures["peak_allocated_gb"] = round(torch.cuda.max_memory_allocated(device) / GB, 2)
    if profile:
        figures["kernels"] = profile_step(stepper, cuda)
    return figures


def profile_step(stepper: Stepper, cuda: bool) -> list[dict[str, Any]]:
    """The twenty kernels that take longest, in milliseconds of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profiled(activities=[activity]) as profiler:
        stepper()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, attribute))
    return [
        {"name": event.key[:90], "ms": round(getattr(event, attribute) / 1e3, 2), "calls": event.count}
        for event in events[:20]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    row = ROWS[options.row]
    if options.device == "cpu":
        take_the_gpu_path()
        row = for_trial(row)
    print(json.dumps(run(row, torch.device(options.device), options.profile)))


if __name__ == "__main__":
    main()
