"""A training step of random weights of any size: what `finetune bench` measures, beside what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.bench.compare import bench
from finetune.bench.random_weights import release_config
from finetune.bench.work import Routing
from finetune.recipe import Recipe

# Between nano and the release: experts of 3 M weights, as many layers as keep a step under some seconds.
SIZES = {
    "hidden": 1024, "intermediate": 1024, "layers": 4, "experts": 32, "top_k": 4, "heads": 16, "kv_heads": 4,
    "head_dim": 64, "vocab": 8192, "sliding_window": 128,
}  # fmt: skip
DTYPES = {"bfloat16": "bf16", "float32": "float32"}


def config_of(**sizes: int) -> dict[str, Any]:
    """config.json of a model of `SIZES` with some of them changed."""
    return {**release_config(**(SIZES | sizes)), "eos_token_id": 1, "pad_token_id": 0}


def recipe_of(tokens: int, rank: int, dtype: str, *, document: int = 0, checkpointing: bool = True) -> Recipe:
    """Attention and experts, one pass a step, documents as long as the pass unless given."""
    return Recipe.model_validate(
        {
            "name": "measured",
            "model": {"base": "random", "dense": DTYPES[dtype]},
            "lora": {"rank": rank, "alpha": 2.0 * rank},
            "data": {"train": "nothing.jsonl", "max_tokens": document or tokens},
            "train": {
                "tokens_per_pass": tokens,
                "tokens_per_step": tokens,
                "gradient_checkpointing": checkpointing,
            },
        }
    )


def measure(
    recipe: Recipe, config: dict[str, Any], *, steps: int, against: Sequence[str] = (),
    routings: Sequence[Routing] = ("natural",),
) -> dict[str, Any]:  # fmt: skip
    """The figures of `finetune bench`, without each side's own conditions, which are recorded once."""
    figures = bench(recipe, against, steps=steps, routings=routings, config=config)
    for routing in routings:
        for side in ("finetune", *against):
            figures[routing][side].pop("conditions", None)
    return figures
