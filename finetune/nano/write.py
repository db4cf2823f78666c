"""Nano's files, laid out as the release's: configs, and weights in two shards with MXFP4 experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.export.dialect import PACKED
from finetune.model.mxfp4 import quantise_mxfp4
from finetune.nano.spec import NetworkSpec
from finetune.nano.tokenizer import VOCABULARY, special_id

SHARDS = 2


def released_config(network: NetworkSpec) -> dict[str, object]:
    """config.json with the keys and in the dialect of the released gpt-oss-20b."""
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": special_id("<|return|>"),
        "experts_per_token": network.experts_per_token,
        "head_dim": network.head_dim,
        "hidden_act": "silu",
        "hidden_size": network.hidden_size,
        "initial_context_length": network.rope_original_positions,
        "initializer_range": network.initial_std,
        "intermediate_size": network.intermediate_size,
        "layer_types": [kinds[i % 2] for i in range(network.layers)],
        "max_position_embeddings": int(network.rope_original_positions * network.rope_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": network.heads,
        "num_experts_per_tok": network.experts_per_token,
        "num_hidden_layers": network.layers,
        "num_key_value_heads": network.key_value_heads,
        "num_local_experts": network.experts,
        "output_router_logits": False,
        "pad_token_id": special_id("<|endoftext|>"),
        "quantization_config": PACKED,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": network.rope_factor,
            "original_max_position_embeddings": network.rope_original_positions,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": network.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": network.sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def network_config(network: NetworkSpec) -> dict[str, object]:
    """The same for a network whose experts are not packed yet."""
    config = released_config(network)
    del config["quantization_config"]
    return config


def generation_config() -> dict[str, object]:
    """As in the release, with the third stop that its later copies add: a tool call."""
    return {
        "bos_token_id": special_id("<|startoftext|>"),
        "do_sample": True,
        "eos_token_id": [special_id(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": special_id("<|endoftext|>"),
        "transformers_version": "4.55.0.dev0",
    }


def released_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the release stores them: bf16; experts `[experts, in, out]` as MXFP4 along in."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            blocks, scales = quantise_mxfp4(tensor.transpose(1, 2).contiguous())
            out[f"{name}_blocks"], out[f"{name}_scales"] = blocks, scales
        else:
            out[name] = tensor.to(torch.bfloat16).contiguous()
    return out


def write_configs(network: NetworkSpec, out: Path) -> None:
    for name, content in (
        ("config.json", released_config(network)),
        ("generation_config.json", generation_config()),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(state: Mapping[str, Tensor], out: Path) -> None:
    """Two shards and their index; the embeddings close the second shard, as in the release."""
    tensors = released_tensors(state)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total, written = sum(sizes.values()), 0
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    where: dict[str, str] = {}
    # Layers in order, then what is outside of them.
    for name in sorted(tensors, key=lambda n: (not n.startswith("model.layers."), n)):
        shard = min(SHARDS - 1, written * SHARDS // total)
        shards[shard][name] = tensors[name]
        where[name] = f"model-{shard:05d}-of-{SHARDS:05d}.safetensors"
        written += sizes[name]
    for i, content in enumerate(shards):
        save_file(content, out / f"model-{i:05d}-of-{SHARDS:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
