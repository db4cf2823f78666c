"""Random gpt-oss weights of any size in the layout of the release: MXFP4 experts, the rest bf16.

Weights are scaled so that activations stay near 1: a difference between two programs is then a real one, not
an overflow, and the routing is spread as in a trained model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.model.checkpoint import INDEX_FILE
from finetune.model.layout import BLOCK, BYTES_PER_BLOCK

# Root mean square of the sixteen FP4 values when every code is equally likely.
FP4_RMS = math.sqrt((0 + 0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)


def release_config(
    *, hidden: int, intermediate: int, layers: int, experts: int, top_k: int, heads: int, kv_heads: int,
    head_dim: int, vocab: int, sliding_window: int,
) -> dict[str, Any]:  # fmt: skip
    """config.json of the release with other sizes, in the dialect of transformers 4 that it is written in."""
    kinds = ["sliding_attention", "full_attention"]
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": top_k,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_types": [kinds[layer % 2] for layer in range(layers)],
        "max_position_embeddings": 131072,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "output_router_logits": False,
        "quantization_config": {"modules_to_not_convert": skipped, "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**yarn, "original_max_position_embeddings": 4096},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
    }


def random_tensors(
    config: dict[str, Any], generator: torch.Generator, *, packed: bool
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a whole model of this configuration, the ends first, then layer by layer."""

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", normal(config["vocab_size"], hidden, std=1.0)
    yield "lm_head.weight", normal(config["vocab_size"], hidden, std=hidden**-0.5)
    yield "model.norm.weight", 1 + normal(hidden, std=0.1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", 1 + normal(hidden, std=0.1)
        yield at + "post_attention_layernorm.weight", 1 + normal(hidden, std=0.1)
        yield at + "self_attn.sinks", normal(config["num_attention_heads"], std=1.0)
        projections = {
            "q": (query, hidden),
            "k": (key_value, hidden),
            "v": (key_value, hidden),
            "o": (hidden, query),
        }
        for name, (rows, columns) in projections.items():
            yield f"{at}self_attn.{name}_proj.weight", normal(rows, columns, std=columns**-0.5)
            yield f"{at}self_attn.{name}_proj.bias", normal(rows, std=0.1)
        yield at + "mlp.router.weight", normal(experts, hidden, std=hidden**-0.5)
        yield at + "mlp.router.bias", normal(experts, std=0.1)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield f"{at}mlp.experts.{name}_bias", normal(experts, rows, std=0.1)
            if packed:
                blocks, scales = _random_mxfp4(experts, rows, columns, generator)
                yield f"{at}mlp.experts.{name}_blocks", blocks
                yield f"{at}mlp.experts.{name}_scales", scales
            else:
                yield f"{at}mlp.experts.{name}", normal(experts, columns, rows, std=columns**-0.5)


def _random_mxfp4(experts: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform codes, and scales within a factor of two of what gives the weight a std of columns**-0.5."""
    shape = (experts, rows, columns // BLOCK)
    blocks = torch.randint(0, 256, (*shape, BYTES_PER_BLOCK), generator=generator, dtype=torch.uint8)
    middle = 127 + round(math.log2(columns**-0.5 / FP4_RMS))
    scales = torch.randint(middle - 1, middle + 2, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


def write_random_base(path: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """Write config.json and a file of random weights for each layer; holds one layer in memory at a time."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}

    def part_of(item: tuple[str, Tensor]) -> str:
        words = item[0].split(".")
        return f"layer-{words[2]}" if words[1] == "layers" else "ends"

    for part, items in groupby(random_tensors(config, generator, packed=True), key=part_of):
        tensors = dict(items)
        save_file(tensors, path / f"{part}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"{part}.safetensors")
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path
