"""What a training step on a processor is made of, in units whose cost is measured (finetune/bench/rates.py).

A step's time is taken as a sum of units, each of which has its own price on a machine and in a dtype. Prices
come from timing this very code on a few layers of other sizes, so they hold what no formula knows: what
threads, caches and small calls cost here.
"""

from __future__ import annotations

import math
from typing import Literal

from finetune.model.cpu_settings import HEAD_TOKENS, HEAD_VOCABULARY
from finetune.predict.memory import ATTENTION_QUERIES, layers_with_attention
from finetune.predict.shape import Shape
from finetune.predict.workload import Workload

Limit = Literal["compute", "memory traffic", "host"]

# Values of a head in the release.
USUAL_HEAD = 64
# Unit -> the part of a step that it is shown as.
PARTS = {
    "products": "products",  # FLOPs with the weights and factors of layers
    # Of a query and a key in one of their products, for each head: half of the cost goes with its size.
    "scores": "attention scores",
    "expert weights": "decoding experts",  # decoded, and read for products however few rows there are
    "rows": "between products",  # values of an expert's rows
    "stream": "between products",  # values of tokens outside of the experts
    "factors": "factors",  # weights of the adapter, which are cast, and whose gradients are made and added
    "experts": "calls",  # each in its layer
    "blocks": "calls",  # of queries
    "layers": "calls",
    "passes": "calls",
    "head products": "products",  # FLOPs with the output head
    "head weights": "products",  # read, and brought to float32, for every tile of tokens
    "head tiles": "calls",  # of tokens by words
    "logits": "logits",
}


# What a part of a step waits for.
LIMITS: dict[str, Limit] = {
    "products": "compute", "attention scores": "compute", "decoding experts": "memory traffic",
    "between products": "memory traffic", "factors": "memory traffic", "logits": "memory traffic",
    "calls": "host",
}  # fmt: skip


def layer_products(shape: Shape, work: Workload) -> float:
    """FLOPs a token in products with the weights of a layer, recomputation included."""
    times = 3 if work.checkpointing else 2
    dense = times * (shape.attention_matrix + shape.experts * shape.hidden)
    # An expert's down projection is not recomputed (finetune/model/expert_layer.py).
    experts = 8 / 3 * shape.top_k * shape.expert_matrix
    # Factors are met once more, for their own gradient.
    return 2 * (dense + experts + (times + 1) * active_lora(shape, work) / shape.layers)


def layers_units(shape: Shape, work: Workload) -> dict[str, float]:
    """Of all layers, forward and backward, in one pass through the model."""
    tokens, layers = work.tokens, shape.layers
    again = 1.0 if work.checkpointing else 2 / 3
    values = 4 * shape.hidden + 2 * shape.query + 2 * shape.key_value
    of_scores = (1 + shape.query / shape.heads / USUAL_HEAD) / 2
    return {
        "products": tokens * layers * layer_products(shape, work),
        "scores": tokens * shape.heads * scored_keys(shape, work, on_cpu=True) * of_scores,
        "expert weights": 2 * shape.expert_weights,
        "rows": tokens * layers * shape.top_k * (shape.hidden + 4 * shape.intermediate),
        "stream": tokens * layers * values * again,
        "factors": shape.lora_weights(work.rank, work.targets),
        "experts": layers * shape.experts,
        "blocks": layers * math.ceil(tokens / ATTENTION_QUERIES) * again,
        "layers": layers,
        "passes": 1.0,
    }


def head_units(tokens: float, hidden: int, words: int) -> dict[str, float]:
    """Of the output head for so many tokens, whose tiles are made again in backward."""
    logits, heights = tokens * words, math.ceil(tokens / HEAD_TOKENS)
    return {
        "head products": 2 * 3 * logits * hidden,
        "head weights": heights * words * hidden,
        "head tiles": heights * math.ceil(words / HEAD_VOCABULARY),
        "logits": logits,
    }


def scored_keys(shape: Shape, work: Workload, *, on_cpu: bool) -> float:
    """Keys that a query is multiplied with in a pass, over all layers and products: 2 forward and 5 backward
    (Dao et al. 2022), and 2 that are made again but where attention is kept.

    In a document of D tokens a query meets D / 2 keys on average; blocks of queries meet half a block more on
    a CPU, where windows come in blocks too. A kernel for GPUs works on tiles of the same size.
    """
    block = ATTENTION_QUERIES
    full = work.document / 2 + block / 2
    windowed = min(full, shape.window + (block if on_cpu else block / 2))
    products = 9 if work.checkpointing else 7
    kept = layers_with_attention(shape, work)
    return full * (shape.full_layers * products - 2 * kept) + windowed * products * (
        shape.layers - shape.full_layers
    )


def active_lora(shape: Shape, work: Workload) -> float:
    """Weights of the adapter that one token meets."""
    dense = sum(shape.lora_weights(work.rank, work.targets, part=p) for p in ("attention", "router"))
    experts = shape.lora_weights(work.rank, work.targets, part="experts")
    return dense + experts * shape.top_k / shape.experts
