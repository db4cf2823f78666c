"""The same LoRA training twice, one after the other: TRL + stock PEFT on the stock model, and TRL on ours.

    python -m tests.measure.against_trl [--tokens 2048] [--steps 8] [--dtypes float32 bfloat16] [--record]

Both sides train attention and all experts of one random checkpoint (hidden 1024, 32 experts, 4 layers) on
the same ids from the same adapter, with gradient checkpointing, in a process of their own. Stock runs its
default `grouped_mm` experts on dequantised weights. Memory is what a process peaks at over what it holds
after its imports, mapped files included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.checkpoints import write_random_checkpoint
from tests.measure.conditions import record, resident_gib

SHAPE = {
    "hidden": 1024, "intermediate": 1024, "layers": 4, "experts": 32, "top_k": 4, "heads": 16, "kv_heads": 4,
    "head_dim": 64, "vocab": 8192, "sliding_window": 128,
}  # fmt: skip
RANK = 8
WARM_UP = 2  # steps that still grow buffers


def train_one_side(
    side: str, checkpoint: Path, adapter: Path, dtype_name: str, tokens: int, steps: int
) -> None:
    """Run in a process of its own; prints one JSON object."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import GptOssForCausalLM
    from trl import SFTTrainer

    from finetune.model import load_adapter, load_base, load_tokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, dtype_name)
    tokenizer = load_tokenizer(checkpoint)
    bare = resident_gib("VmRSS")
    if side == "ours":
        base = load_base(checkpoint, dtype=dtype, device="cpu")
        model = load_adapter(base, adapter, base=checkpoint, trainable=True)
    else:
        stock = GptOssForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager")
        model = PeftModel.from_pretrained(stock, str(adapter), is_trainable=True)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, SHAPE["vocab"], (tokens,), generator=generator).tolist() for _ in range(steps)]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    clock = _make_clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(folder, steps)
        SFTTrainer(
            model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]
        ).train()
    print(
        json.dumps(
            {
                "tokens_per_second": round(tokens / statistics.median(clock.seconds), 1),
                "step_seconds": [round(value, 3) for value in clock.seconds],
                "memory_gib": round(resident_gib() - bare, 3),
                "losses": clock.losses,
            }
        )
    )


def _make_clock() -> Any:
    """A trainer callback with the seconds of each step after the warm-up, and the losses of all."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.times: list[float] = []
            self.losses: list[float] = []

        @property
        def seconds(self) -> list[float]:
            kept = self.times[WARM_UP - 1 :]
            return [later - earlier for earlier, later in itertools.pairwise(kept)]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Clock()


def _arguments(folder: str, steps: int) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        seed=0,
        max_steps=steps,
        per_device_train_batch_size=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        router_aux_loss_coef=0.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def measure(tokens: int, steps: int, dtypes: list[str]) -> dict[str, Any]:
    """Both sides for each dtype, and their ratios."""
    import torch

    from finetune.model import add_lora, load_base, save_adapter

    figures: dict[str, Any] = {"shape": SHAPE, "rank": RANK, "tokens_per_step": tokens, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, adapter = Path(folder) / "base", Path(folder) / "adapter"
        write_random_checkpoint(checkpoint, **SHAPE, tokenizer="bytes")  # type: ignore[arg-type]
        torch.manual_seed(0)
        base = load_base(checkpoint, dtype=torch.float32, device="cpu")
        fresh = add_lora(base, rank=RANK, alpha=16, targets=["attention", "experts"])
        save_adapter(fresh, adapter, base=checkpoint)
        for dtype in dtypes:
            sides = {
                side: run_side(side, checkpoint, adapter, dtype, tokens, steps) for side in ("stock", "ours")
            }
            ours, stock = sides["ours"], sides["stock"]
            pairs = zip(ours["losses"], stock["losses"], strict=True)
            figures[dtype] = {
                "speed_ratio": round(ours["tokens_per_second"] / stock["tokens_per_second"], 3),
                "memory_ratio": round(ours["memory_gib"] / stock["memory_gib"], 3),
                "largest_loss_difference": max(abs(a - b) for a, b in pairs),
                **sides,
            }
    return figures


def run_side(
    side: str, checkpoint: Path, adapter: Path, dtype: str, tokens: int, steps: int
) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.measure.against_trl",
        "--side",
        side,
        "--checkpoint",
        str(checkpoint),
    ]
    command += ["--adapter", str(adapter), "--dtypes", dtype, "--tokens", str(tokens), "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        dtype,
        side,
        {key: figures[key] for key in ("tokens_per_second", "memory_gib")},
        file=sys.stderr,
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side = options.side
        train_one_side(
            side, options.checkpoint, options.adapter, options.dtypes[0], options.tokens, options.steps
        )
        return
    figures = measure(options.tokens, options.steps, options.dtypes)
    print(json.dumps(figures, indent=2))
    if options.record:
        record("against_trl", f"python -m tests.measure.against_trl --tokens {options.tokens}", figures)


if __name__ == "__main__":
    main()
