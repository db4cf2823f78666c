"""A tiny base, a few rows and a recipe to train with, shared by the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.recipe import dump_recipe, load_recipe
from tests.checkpoints import write_random_checkpoint

# A step takes some 0.1 s on one core: two passes of 512 tokens.
RECIPE = """
name: tiny
model: {base: base, dense: float32}
lora: {rank: 4}
data: {train: [{path: rows.jsonl}], max_tokens: 512, held_out: 0.1}
train: {tokens_per_step: 1024, tokens_per_pass: 512, learning_rate: 1.0e-2, max_steps: 4, save_every_steps: 2}
export: {formats: []}
"""


def write_project(folder: Path, *overrides: str) -> Path:
    """Write base/, rows.jsonl and recipe.yaml into a folder; returns the recipe's path."""
    write_random_checkpoint(folder / "base", tokenizer="bytes")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            user = {"role": "user", "content": f"{number} + {number % 7}?"}
            answer = {"role": "assistant", "thinking": "add", "content": str(number + number % 7)}
            file.write(json.dumps({"messages": [user, answer]}) + "\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    if overrides:
        recipe.write_text(dump_recipe(load_recipe(recipe, overrides)), encoding="utf-8")
    return recipe


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the figures that depend on the machine's pace."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_gb")} for row in rows
    ]
