"""LoRA steps on a full-size checkpoint on a CPU, experts packed: time, memory, share of the machine's rate.

    THP_MEM_ALLOC_ENABLE=1 python -m tests.measure.real_size_step CHECKPOINT [--tokens 1024] [--steps 2]
        [--rank 8] [--record]

CHECKPOINT is a gpt-oss directory in the released layout. Random weights do: shapes, speed and memory are the
same. The machine's rate is that of one large bfloat16 product; a step's products are counted as its
mathematics has them: forward, the gradients, and what is computed again, without decoding or padding.
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
from finetune.model.cpu_settings import keep_freed_memory, multiply_float32_fast
from tests.measure.conditions import record, resident_gib


def matrix_rate(size: int = 4096, repeats: int = 5) -> float:
    """Floating point operations a second of a bfloat16 product of two square matrices; the best of some."""
    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds[1:]))


def step_operations(config: Any, tokens: int) -> float:
    """Floating point operations of a step's products by the base's weights, attention's scores left out.

    Attention and the router run twice forward and once for the gradient of their input; experts forward, up
    again and the gradient of both inputs; the head forward and for the gradient of its input.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = hidden * (heads * config.head_dim + config.num_local_experts)
    experts = config.num_experts_per_tok * hidden * inner * ((2 + 1) + 2 + (2 + 1))
    layers = config.num_hidden_layers * (3 * attention + experts)
    return float(2 * tokens * (layers + 2 * hidden * config.vocab_size))


def measure(checkpoint: Path, tokens: int, steps: int, rank: int) -> dict[str, Any]:
    """Load, adapt and take `steps` optimiser steps of `tokens` random tokens."""
    rate = matrix_rate()
    multiply_float32_fast()  # as `finetune train` does
    keep_freed_memory()
    began = time.perf_counter()
    anonymous = resident_gib("RssAnon")
    base = load_base(checkpoint, dtype=torch.bfloat16, device="cpu")
    figures: dict[str, Any] = {
        "tokens": tokens,
        "rank": rank,
        "matrix_rate_gflops": round(rate / 1e9, 1),
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
    operations = step_operations(base.config, tokens)
    # The first step reads the file.
    figures["share_of_matrix_rate"] = round(operations / figures["steps"][-1]["seconds"] / rate, 3)
    figures["step_operations"] = operations
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    figures = measure(options.checkpoint, options.tokens, options.steps, options.rank)
    print(json.dumps(figures, indent=2))
    if options.record:
        sizes = f"--tokens {options.tokens} --steps {options.steps} --rank {options.rank}"
        pages = "THP_MEM_ALLOC_ENABLE=1 " if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""
        record("real_size_step", f"{pages}python -m tests.measure.real_size_step CHECKPOINT {sizes}", figures)


if __name__ == "__main__":
    main()
