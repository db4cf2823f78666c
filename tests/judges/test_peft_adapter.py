"""Judge: stock PEFT on stock transformers, which dequantises the release, against our model and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.export import export
from finetune.model import add_lora, load_adapter, load_base, resolve, save_adapter
from tests.checkpoints import NANO, write_random_checkpoint

ODD_SHAPES: list[dict[str, Any]] = [
    {"hidden": 96, "layers": 3, "experts": 5, "top_k": 3, "intermediate": 32, "shards": 3},
    {"hidden": 160, "layers": 1, "experts": 7, "top_k": 1, "intermediate": 224, "heads": 6, "kv_heads": 3},
]
SETTINGS: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 8, "targets": ["attention", "experts"]},
    {"rank": 3, "alpha": 7.5, "targets": ["attention", "experts", "router"], "rslora": True},
    {"rank": 8, "alpha": 8, "targets": ["experts"]},
    {"rank": 2, "alpha": 4, "targets": ["attention"]},
]


def tuned_adapter(base: Path, out: Path, dtype: torch.dtype = torch.float32, **setting: Any) -> Tensor:
    """Save an adapter as large as a real one to `out`; returns our model's logits with it."""
    torch.manual_seed(1)
    model = add_lora(load_base(base, dtype=dtype, device="cpu"), **setting)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    save_adapter(model, out, base=base)
    return logits(model.to(dtype))


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def stock_logits(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    # Its grouped products refuse float64.
    experts = "eager" if dtype == torch.float64 else "grouped_mm"
    stock = GptOssForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation=experts)
    assert type(stock.model.layers[0].mlp.experts).__name__ == "GptOssExperts"  # dequantised
    plain = logits(stock)
    tuned = logits(PeftModel.from_pretrained(stock, str(adapter)).to(dtype))
    assert (tuned - plain).abs().max() > 0.01, "the adapter must do something for this to be a test"
    return tuned


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=["5-experts", "7-experts"])
@pytest.mark.parametrize("setting", SETTINGS, ids=["default", "rslora-router", "experts", "attention"])
def test_stock_peft_gives_the_same_logits_on_odd_shapes(
    tmp_path: Path, shape: dict[str, Any], setting: dict[str, Any]
) -> None:
    base = write_random_checkpoint(tmp_path / "base", **shape)
    ours = tuned_adapter(base, tmp_path / "adapter", **setting)
    export(tmp_path / "adapter", "adapter", tmp_path / "out")
    assert (stock_logits(base, tmp_path / "out") - ours).abs().max() < 1e-5


def test_stock_peft_gives_the_same_logits_on_nano(tmp_path: Path) -> None:
    """In float64: nano's logits reach 34, where stock in float32 is 2e-5 from stock in float64 by itself."""
    if not (NANO / "config.json").is_file():
        pytest.skip("the bundled model is not there")
    base, setting = resolve("nano").base, {"rank": 8, "alpha": 16, "targets": ["attention", "experts"]}
    ours = tuned_adapter(base, tmp_path / "adapter", torch.float64, **setting)
    export(tmp_path / "adapter", "adapter", tmp_path / "out", base="nano")
    assert (stock_logits(base, tmp_path / "out", torch.float64) - ours).abs().max() < 1e-5


@pytest.mark.parametrize("kept", ["gate_up_proj", "down_proj"])
def test_an_adapter_of_one_expert_parameter_is_exported_with_zeros_for_the_other(
    tmp_path: Path, kept: str
) -> None:
    base = write_random_checkpoint(tmp_path / "base", **ODD_SHAPES[0])
    stock = GptOssForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=[f"mlp.experts.{kept}"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(stock, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    manifest = export(tmp_path / "adapter", "adapter", tmp_path / "out", base=str(base))
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert manifest["proof"]["zero_tensors_added"] == 2 * 3
    assert sum(".experts.base_layer.lora_" in key for key in written) == 2 * 3
    assert sum(".experts.lora_" in key for key in written) == 2 * 3
    assert (stock_logits(base, tmp_path / "out") - expected).abs().max() < 1e-5
    ours = load_adapter(load_base(base, dtype=torch.float32, device="cpu"), tmp_path / "out", base=base)
    assert (logits(ours) - expected).abs().max() < 1e-5
