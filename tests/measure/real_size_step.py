"""LoRA steps on a full-size checkpoint on this machine's CPU, experts packed: time, memory, coverage.

    python -m tests.measure.real_size_step CHECKPOINT [--tokens 256] [--steps 2] [--rank 8] [--record]

CHECKPOINT is a gpt-oss directory in the released layout. Random weights do: shapes, speed and memory are the
same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finetune.model import CoverageCheck, add_lora, load_base
from tests.measure.conditions import record, resident_gib


def measure(checkpoint: Path, tokens: int, steps: int, rank: int) -> dict[str, Any]:
    """Load, adapt and take `steps` optimiser steps of `tokens` random tokens."""
    began = time.perf_counter()
    anonymous = resident_gib("RssAnon")
    base = load_base(checkpoint, dtype=torch.bfloat16, device="cpu")
    figures: dict[str, Any] = {
        "tokens": tokens,
        "rank": rank,
        "file_gib": round(sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) / 2**30, 2),
        "load_seconds": round(time.perf_counter() - began, 2),
        "load_extra_gib": round(resident_gib("RssAnon") - anonymous, 3),
    }
    model = add_lora(base, rank=rank, alpha=2 * rank, targets=["attention", "experts"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    figures["trained_parameters"] = sum(parameter.numel() for parameter in trained)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    coverage = CoverageCheck(model)
    ids = torch.randint(0, base.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    figures["steps"] = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        reached = coverage.check(step) if step <= CoverageCheck.LAST_STEP else {}
        optimizer.step()
        optimizer.zero_grad()
        figures["steps"].append({
            "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - start, 2),
            "forward_seconds": round(forward - start, 2), "backward_seconds": round(backward - forward, 2),
            "peak_resident_gib": round(resident_gib(), 2), **reached,
        })  # fmt: skip
        print(json.dumps(figures["steps"][-1]), file=sys.stderr, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    figures = measure(options.checkpoint, options.tokens, options.steps, options.rank)
    print(json.dumps(figures, indent=2))
    if options.record:
        sizes = f"--tokens {options.tokens} --steps {options.steps} --rank {options.rank}"
        record("real_size_step", f"python -m tests.measure.real_size_step CHECKPOINT {sizes}", figures)


if __name__ == "__main__":
    main()
