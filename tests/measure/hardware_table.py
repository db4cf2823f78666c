"""The README's table of GPUs: what is predicted for the shipped recipes, changed as far as a GPU needs it.

    python -m tests.measure.hardware_table

tests/unit/test_predict.py compares the README with what this prints.
"""

from __future__ import annotations

from pathlib import Path

from finetune.predict import RELEASED, gpu, predict
from finetune.recipe import Recipe, load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GPUS = ("16gb", "rtx4090", "l4", "a100-40", "l40s", "h100-80", "h200")
MODELS = ("gpt-oss-20b", "gpt-oss-120b")
HEAD = ["| GPU | `gpt-oss-20b` | memory | tokens/s | `gpt-oss-120b` | memory | tokens/s |"]
HEAD += ["| --- | --- | ---: | ---: | --- | ---: | ---: |"]


def cells(model: str, name: str) -> list[str]:
    """What to change, peak memory and speed."""
    shape, machine = RELEASED[f"openai/{model}"], gpu(name)

    def recipe(*overrides: str) -> Recipe:
        return load_recipe(RECIPES / model / "chat.yaml", overrides)

    found, changed = predict(recipe(), shape, machine), "as it is"
    if found.change:
        if not found.change.enough:
            return ["does not fit", "", ""]
        changed = ", ".join(f"`{words}`" for words in found.change.overrides)
        found = predict(recipe(*found.change.overrides), shape, machine)
    pace = round(found.speed.tokens_per_second, -2 if found.speed.tokens_per_second > 1000 else -1)
    host = f" + {found.host_bytes / 1e9:.0f} GB of host" if found.host_bytes > 1e9 else ""
    return [changed, f"{found.memory.total / 1e9:.1f} GB{host}", f"{pace:,.0f}"]


def table() -> list[str]:
    """Lines of Markdown."""
    rows = [[gpu(name).name, *(cell for model in MODELS for cell in cells(model, name))] for name in GPUS]
    return HEAD + [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    print("\n".join(table()))
