"""What ours is compared with: transformers' own model in bf16, LoRA by PEFT alone, grouped products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GptOssForCausalLM

from finetune.model.attention import use_packed_attention
from tests.gpu.models import config_of


def stock_model(size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Random weights, experts dense; loss, attention and packing are ours, so that experts alone differ."""
    config = config_of(size, dtype)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model = GptOssForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.02)
    # Its frequencies are computed, not drawn.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    use_packed_attention(model)
    return model.requires_grad_(False)
