"""What `finetune check` predicts against what training takes on this machine's CPU: memory and speed.

    python -m tests.measure.prediction [--only WORD ...] [--steps 5] [--again] [--record]

Random weights of several sizes, contexts, ranks and dtypes. Memory is what a process peaks at, with and
without what it holds after its imports; speed is that of the median step. A machine's speed can drift by a
fifth within minutes, so its rates are measured before every second point, as somebody has them who checks and
then trains. runs/reference/prediction.json keeps the measurements: --only makes some of them anew. --again
makes none: predictions follow a change of their formulas.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from finetune.predict import Machine, Shape, Workload, predict_memory, predict_speed, this_machine
from finetune.recipe import Recipe
from tests.measure.conditions import REFERENCE, record
from tests.measure.random_size import config_of, measure, recipe_of

COMMAND = "python -m tests.measure.prediction --record"
POINTS_A_MACHINE = 2
KINDS = ("memory_gb", "memory_over_imports_gb", "tokens_per_second")


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


def compare(
    recipe: Recipe, config: dict[str, Any], measured: dict[str, Any], machine: Machine
) -> dict[str, Any]:
    """One point: predicted, measured, and by how much the first is off."""
    shape, work = Shape.of(config), Workload.of(recipe)
    memory, speed = predict_memory(shape, work, machine), predict_speed(shape, work, machine)
    imports = measured["libraries_gb"]
    total, peak = memory.total / 1e9, measured["peak_gb"]
    pairs = {
        "memory_gb": (total, peak),
        "memory_over_imports_gb": (total - imports, peak - imports),
        "tokens_per_second": (speed.tokens_per_second, measured["tokens_per_second"]),
    }
    off = {
        key: {"predicted": round(a, 4), "measured": round(b, 4), "off": round(a / b - 1, 4)}
        for key, (a, b) in pairs.items()
    }
    parts = {part.name: round(part.seconds, 4) for part in speed.parts}
    return {**off, "predicted_memory": memory.to_dict(), "predicted_seconds": parts}


def measured_point(recipe: Recipe, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """What is kept of a measurement."""
    figures = measure(recipe, config, steps=steps)
    ours = figures["natural"]["finetune"]
    keys = ("tokens_per_second", "step_seconds", "peak_gb", "libraries_gb")
    return {key: ours[key] for key in keys}


def worst(table: dict[str, Any]) -> dict[str, float]:
    """The largest error of each kind, and how many points are within 10%."""
    found: dict[str, float] = {"points": len(table)}
    for kind in KINDS:
        errors = [abs(point[kind]["off"]) for point in table.values()]
        found[f"worst, {kind}"] = max(errors)
        found[f"within 10%, {kind}"] = sum(error <= 0.1 for error in errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="points with one of them in their name"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure nothing, predict anew")
    parser.add_argument("--record", action="store_true", help="keep the table under runs/reference/")
    options = parser.parse_args()
    file = REFERENCE / "prediction.json"
    table: dict[str, Any] = json.loads(file.read_text())["figures"]["table"] if file.is_file() else {}
    measured = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe, config in points():
            if not options.again and any(word in name for word in options.only):
                # Rates are measured where there are none yet.
                os.environ["FINETUNE_CACHE"] = f"{folder}/{measured // POINTS_A_MACHINE}"
                machine = this_machine(recipe.model.computes_in)
                measured += 1
                figures = measured_point(recipe, config, options.steps)
                table[name] = {"measured": figures, "machine": asdict(machine)}
            if point := table.get(name):
                table[name] |= compare(recipe, config, point["measured"], Machine(**point["machine"]))
                print(name, {kind: f"{table[name][kind]['off']:+.1%}" for kind in KINDS}, flush=True)
    if options.record:
        record("prediction", COMMAND, {"worst": worst(table), "table": table})
    print(json.dumps(worst(table), indent=2))


if __name__ == "__main__":
    main()
