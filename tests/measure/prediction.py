"""What `finetune check` predicts against what training takes on this machine's CPU: memory and speed.

    python -m tests.measure.prediction [--only WORD] [--steps 5] [--record]

Random weights of several sizes, contexts, ranks and dtypes. Memory is what a process peaks at, over what it
holds after its imports and with it; speed is that of the median step. With --record a table of all points so
far is kept in runs/reference/prediction.json, so that --only can add to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from finetune.recipe import Recipe
from tests.measure.conditions import REFERENCE, record
from tests.measure.random_size import config_of, measure, recipe_of

COMMAND = "python -m tests.measure.prediction --record"


def points() -> Iterator[tuple[str, Recipe, dict[str, Any]]]:
    """Name, recipe and config.json of each."""
    nano = {
        "hidden": 128, "intermediate": 128, "experts": 8, "top_k": 2, "heads": 4, "kv_heads": 2,
        "head_dim": 32, "vocab": 1024,
    }  # fmt: skip
    many = {
        "hidden": 256, "intermediate": 256, "layers": 8, "experts": 64, "heads": 8, "kv_heads": 2,
        "vocab": 32768,
    }  # fmt: skip
    words = {
        "hidden": 512, "intermediate": 512, "layers": 2, "experts": 8, "heads": 8, "kv_heads": 2,
        "vocab": 201_088,
    }  # fmt: skip
    wide = {"hidden": 2880, "intermediate": 2880, "layers": 1, "experts": 8, "heads": 64, "kv_heads": 8}
    for dtype in ("float32", "bfloat16"):
        yield f"nano, {dtype}", recipe_of(2048, 16, dtype), config_of(**nano)
        yield f"1024 wide, 512 tokens, {dtype}", recipe_of(512, 8, dtype), config_of()
        yield f"1024 wide, 2048 tokens, {dtype}", recipe_of(2048, 8, dtype), config_of()
        yield f"64 experts, rank 32, {dtype}", recipe_of(1024, 32, dtype), config_of(**many)
        yield f"201,088 words, {dtype}", recipe_of(512, 8, dtype), config_of(**words)
        yield f"2880 wide, {dtype}", recipe_of(512, 8, dtype), config_of(**wide)
    yield "1024 wide, rank 64", recipe_of(1024, 64, "bfloat16"), config_of()
    yield "8192 tokens in one document", recipe_of(8192, 8, "bfloat16"), config_of(**(many | {"layers": 2}))
    documents = recipe_of(8192, 8, "bfloat16", document=512)
    yield "8192 tokens in documents of 512", documents, config_of(**(many | {"layers": 2}))
    yield "without recomputation", recipe_of(1024, 8, "float32", checkpointing=False), config_of()


def compare(figures: dict[str, Any]) -> dict[str, Any]:
    """One point: predicted, measured, and by how much the first is off."""
    predicted, measured = figures["predicted"], figures["natural"]["finetune"]
    pairs = {
        "memory_gb": (predicted["memory_bytes"]["total"] / 1e9, measured["peak_gb"]),
        "memory_over_imports_gb": (predicted["memory_gb"], measured["memory_gb"]),
        "tokens_per_second": (predicted["tokens_per_second"], measured["tokens_per_second"]),
    }
    return {
        key: {"predicted": round(a, 4), "measured": round(b, 4), "off": round(a / b - 1, 4)}
        for key, (a, b) in pairs.items()
    } | {"step_seconds": measured["step_seconds"], "memory_bytes": predicted["memory_bytes"]}


def worst(table: dict[str, Any]) -> dict[str, float]:
    """The largest error of each kind, and how many points are within 10%."""
    kinds = ("memory_gb", "memory_over_imports_gb", "tokens_per_second")
    found: dict[str, float] = {"points": len(table)}
    for kind in kinds:
        errors = [abs(point[kind]["off"]) for point in table.values()]
        found[f"worst, {kind}"] = max(errors)
        found[f"within 10%, {kind}"] = sum(error <= 0.1 for error in errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", metavar="WORD", help="points with this in their name")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="keep the table under runs/reference/")
    options = parser.parse_args()
    file = REFERENCE / "prediction.json"
    table: dict[str, Any] = json.loads(file.read_text())["figures"]["table"] if file.is_file() else {}
    machine: dict[str, Any] = {}
    for name, recipe, config in points():
        if options.only in name:
            figures = measure(recipe, config, steps=options.steps)
            machine, table[name] = figures["machine"], compare(figures)
            off = {
                kind: f"{p['off']:+.1%}"
                for kind, p in table[name].items()
                if isinstance(p, dict) and "off" in p
            }
            print(name, off, flush=True)
            if options.record:
                record("prediction", COMMAND, {"worst": worst(table), "machine": machine, "table": table})
    print(json.dumps(worst(table), indent=2))


if __name__ == "__main__":
    main()
