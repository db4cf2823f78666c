"""What the tests of the model share: a decoder written from the format's definition, and stock models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from finetune.model import cpu, load_base


def decode_by_definition(blocks: Tensor, scales: Tensor) -> Tensor:
    """`blocks [..., n, 16]`, `scales [..., n]` -> float64 `[..., n * 32]`, from the bits of E2M1 and E8M0."""
    packed = blocks.numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, 32).astype(np.int64)
    sign, exponent, mantissa = 1 - 2 * (codes >> 3), codes >> 1 & 3, codes & 1
    magnitude = np.where(exponent == 0, mantissa * 0.5, np.ldexp(1 + mantissa / 2, exponent - 1))
    values = np.ldexp(sign * magnitude, scales.numpy().astype(np.int64)[..., None] - 127)
    values[scales.numpy() == 255] = np.nan
    return torch.from_numpy(values).flatten(-2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def without_native_products(patch: pytest.MonkeyPatch) -> None:
    """Have torch's operations do the products, as on other processors."""
    patch.setattr(cpu, "native_products", lambda dtype: None)


def our_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(path, dtype=dtype, device="cpu")


def stock_model(path: Path) -> nn.Module:
    """transformers' own float32 model of a checkpoint, its experts dequantised by transformers."""
    model = GptOssForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    assert type(model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    stock: nn.Module = model.eval()
    return stock


def random_ids(*shape: int, vocab: int = 300, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
