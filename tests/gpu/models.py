"""gpt-oss of full size with random weights, made on the device: no checkpoint is read or written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from finetune.bench.random_weights import FP4_RMS, release_config
from finetune.model import experts
from finetune.model.experts import PackedExperts, Scratch
from finetune.model.kernels.stream import ExpertStream
from finetune.model.kernels.wide import Wide
from finetune.model.layout import expected_tensors
from finetune.model.loading import adapt_config, assemble
from finetune.model.shrink import keep_embedding_on_host, quantise_attention

_RELEASED = {
    "hidden": 2880, "intermediate": 2880, "top_k": 4, "heads": 64, "kv_heads": 8, "head_dim": 64,
    "vocab": 201088, "sliding_window": 128,
}  # fmt: skip
SIZES: dict[str, dict[str, int]] = {
    "20b": {**_RELEASED, "layers": 24, "experts": 32},
    "120b": {**_RELEASED, "layers": 36, "experts": 128},
    # For trying all of this without a GPU.
    "tiny": {
        "hidden": 64, "intermediate": 96, "top_k": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "vocab": 320, "sliding_window": 16, "layers": 2, "experts": 4,
    },
}  # fmt: skip


def take_the_gpu_path() -> None:
    """For a trial on a CPU: the expert layer's back end for GPUs, on plain torch."""
    experts._back_end_for = Wide.on


def config_of(size: str, dtype: torch.dtype) -> GptOssConfig:
    return adapt_config(GptOssConfig.from_dict(release_config(**SIZES[size])), dtype)


def random_model(
    size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, *, nf4: bool = False,
    experts_on_host: bool = False,
) -> GptOssForCausalLM:  # fmt: skip
    """A frozen model on `device`; weights are as large as a trained model's, so that routing spreads."""
    away = [*(["experts."] if experts_on_host else []), *(["embed_tokens"] if nf4 else [])]
    tensors = {
        name: tensor.cpu() if any(part in name for part in away) and "_bias" not in name else tensor
        for name, tensor in _random_tensors(SIZES[size], device, dtype)
    }
    model = assemble(config_of(size, dtype), tensors, packed=True)
    del tensors
    if nf4:
        quantise_attention(model, dtype)
        keep_embedding_on_host(model)
    if experts_on_host:
        stream = ExpertStream(device)
        for layer in model.model.layers:
            layer.mlp.experts.keep_on_host(stream)
    return model.to(device)


def _random_tensors(
    sizes: dict[str, int], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    random = torch.Generator(device).manual_seed(0)
    config: dict[str, Any] = release_config(**sizes)
    for name, shape in expected_tensors(config, packed=True):
        if name.endswith("_blocks"):
            blocks = torch.randint(256, shape, generator=random, device=device, dtype=torch.uint8)
            yield name.removesuffix("_blocks"), blocks
        elif name.endswith("_scales"):
            # Weights of about 1 / sqrt(inputs).
            exponent = round(math.log2((shape[-1] * 32) ** -0.5 / FP4_RMS))
            scale = torch.randint(-1, 2, shape, generator=random, device=device) + 127 + exponent
            yield name, scale.to(torch.uint8)
        elif "norm" in name:
            yield name, torch.ones(shape, device=device, dtype=dtype)
        else:
            std = 0.02 if len(shape) == 1 or name.endswith("_bias") else shape[-1] ** -0.5
            if "embed_tokens" in name:
                std = 1.0
            values = torch.empty(shape, device=device, dtype=dtype)
            yield name, values.normal_(std=std, generator=random)


def random_experts(size: str, device: torch.device) -> PackedExperts:
    """The experts of one layer."""
    sizes = {**SIZES[size], "layers": 1, "vocab": 32}
    config = GptOssConfig.from_dict(release_config(**sizes))
    with torch.device("meta"):
        layer = PackedExperts(config, Scratch())
    prefix = "model.layers.0.mlp.experts."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in _random_tensors(sizes, device, torch.bfloat16)
        if name.startswith(prefix)
    }
    layer.load_state_dict(tensors, assign=True, strict=True)
    return layer.requires_grad_(False)
