"""The `original/` layout of OpenAI's code: the released bytes under other names; q, k and v joined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.dialect import released_config
from finetune.export.subject import Subject
from finetune.export.tensors import Checkpoint, Planned, write_safetensors
from finetune.model import inspect_checkpoint

# Ours to theirs; {} is the layer.
TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
LAYER = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
JOINED = {f"attn.qkv.{part}": [f"self_attn.{x}_proj.{part}" for x in "qkv"] for part in ("weight", "bias")}
# dtypes.json names the formats of the packed experts by their own words.
PACKED_WORDS = {"blocks": "FP4", "scales": "UE8"}
FOLDER, WEIGHTS = "original", "model.safetensors"
USE = """```
python -m gpt_oss.generate --backend torch original/
```
"""


def write_openai(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write `folder`/original; returns the figures of the proof.

    Raises:
        FinetuneError: the experts are not MXFP4, or what was written is not what was read.
    """
    check_packed(subject)
    checkpoint = Checkpoint(subject.base.path)
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    tensors = list(relayout(checkpoint))
    write_safetensors(out / WEIGHTS, tensors)
    dtypes = {t.name: PACKED_WORDS.get(t.name.rsplit(".", 1)[1], t.dtype) for t in tensors}
    (out / "dtypes.json").write_text(json.dumps(dtypes) + "\n", encoding="utf-8")
    config = original_config(released_config(checkpoint.config, packed=True))
    (out / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    return {"tensors": len(tensors), "bytes_equal_to_the_source": _prove(checkpoint, out / WEIGHTS)}


def check_packed(subject: Subject) -> None:
    """The experts are MXFP4, as this layout has no other.

    Raises:
        FinetuneError: they are not.
    """
    if inspect_checkpoint(subject.base.path).kind != "mxfp4":
        raise FinetuneError(
            "OpenAI's layout holds MXFP4 experts, and this checkpoint has bf16 ones", at=subject.base.name
        )


def names(layers: int) -> Iterator[tuple[str, list[str]]]:
    """Every name of theirs with the released names of the tensors that it joins."""
    for theirs, ours in TOP.items():
        yield theirs, [ours]
    for layer in range(layers):
        for theirs, ours in LAYER.items():
            yield f"block.{layer}.{theirs}", [f"model.layers.{layer}.{ours}"]
        for theirs, several in JOINED.items():
            yield f"block.{layer}.{theirs}", [f"model.layers.{layer}.{ours}" for ours in several]


def relayout(checkpoint: Checkpoint) -> Iterator[Planned]:
    """The tensors of a released-layout checkpoint under the names of OpenAI's code."""
    for theirs, ours in names(checkpoint.info.layers):
        if len(ours) == 1:
            yield checkpoint.copied(ours[0], theirs)
            continue
        shapes = [checkpoint.shape(name) for name in ours]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        parts = [checkpoint.copied(name) for name in ours]
        yield Planned(theirs, checkpoint.dtype(ours[0]), shape, lambda parts=parts: _chain(parts))  # type: ignore[misc]


def _chain(parts: list[Planned]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.pieces()


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of `original/` from the released one."""
    scaling = config["rope_scaling"]
    return {
        "num_hidden_layers": config["num_hidden_layers"],
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["experts_per_token"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "swiglu_limit": config.get("swiglu_limit", 7.0),
        "head_dim": config["head_dim"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "sliding_window": config["sliding_window"],
        "initial_context_length": config["initial_context_length"],
        "rope_theta": config["rope_theta"],
        "rope_scaling_factor": scaling["factor"],
        "rope_ntk_alpha": scaling["beta_slow"],
        "rope_ntk_beta": scaling["beta_fast"],
    }


def _prove(checkpoint: Checkpoint, file: Path) -> int:
    """Compare every byte, read by the safetensors library; returns how many there are."""
    compared = 0
    with safe_open(file, framework="pt") as stored:
        for theirs, ours in names(checkpoint.info.layers):
            found, start = stored.get_slice(theirs), 0
            for name in ours:
                for piece in checkpoint.copied(name).pieces():
                    if not torch.equal(found[start : start + len(piece)], piece):
                        raise FinetuneError(f"'{theirs}' read back differs from the source", at=str(file))
                    start += len(piece)
                    compared += piece.nbytes
    return compared
