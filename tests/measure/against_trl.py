"""The same LoRA training twice, one after the other: TRL + stock PEFT on the stock model, and TRL on ours.

    python -m tests.measure.against_trl [--tokens 2048] [--steps 6] [--dtypes float32 bfloat16] [--record]

It is `finetune bench --against trl` on random weights of hidden 1024, 32 experts and 4 layers: both sides
train attention and all experts on the same ids from the same adapter, with gradient checkpointing, the same
loss and the same attention over packed documents. Stock runs its default `grouped_mm` experts on dequantised
weights. Memory is what a process peaks at over what it holds after its imports, mapped files included.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from tests.measure.conditions import record
from tests.measure.random_size import config_of, measure, recipe_of

RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for dtype in options.dtypes:
        recipe = recipe_of(options.tokens, RANK, dtype)
        figures[dtype] = measure(recipe, config_of(), steps=options.steps, against=["trl"])
        print(
            json.dumps(
                {
                    dtype: {
                        key: figures[dtype][key] for key in ("natural", "balanced") if key in figures[dtype]
                    }
                }
            )
        )
    if options.record:
        record("against_trl", f"python -m tests.measure.against_trl --tokens {options.tokens}", figures)


if __name__ == "__main__":
    main()
