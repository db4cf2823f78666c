"""The same LoRA training twice, one after the other: TRL + stock PEFT on the stock model, and TRL on ours.

    python -m tests.measure.against_trl [--tokens 512 2048 4096] [--steps 3] [--dtypes ...] [--record]

It is `finetune bench --against trl` on random weights of hidden 1024, 32 experts and 4 layers: both sides
train attention and all experts on the same ids from the same adapter, with gradient checkpointing, the same
loss and the same attention over packed documents. Stock runs its default `grouped_mm` experts on dequantised
weights. Memory is what a process peaks at over what it holds after its imports, mapped files included.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from tests.measure.conditions import REFERENCE, record
from tests.measure.random_size import config_of, measure, recipe_of

RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    # Sizes that are not measured keep their figures.
    kept = REFERENCE / "against_trl.json"
    figures: dict[str, Any] = json.loads(kept.read_text())["figures"] if options.record else {}
    for tokens in options.tokens:
        for dtype in options.dtypes:
            found = measure(recipe_of(tokens, RANK, dtype), config_of(), steps=options.steps, against=["trl"])
            figures.setdefault(f"{tokens} tokens", {})[dtype] = found
            print(json.dumps({f"{tokens} tokens, {dtype}": found["natural"]["against"]}), flush=True)
            if options.record:
                record("against_trl", "python -m tests.measure.against_trl --record", figures)


if __name__ == "__main__":
    main()
