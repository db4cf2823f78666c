"""Merged weights compute what the adapter computes, judged by stock PEFT on stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from finetune.export.merge import Deltas, scale_of
from finetune.export.peft_files import Adapter
from finetune.export.subject import find_subject
from finetune.export.weights import Weights
from finetune.model import add_lora, load_base, resolve, save_adapter
from tests.checkpoints import write_random_checkpoint
from tests.export_kit import write_adapter
from tests.model_kit import random_ids, relative_error, stock_model

EXPERTS = 5


@pytest.mark.parametrize("patterns", [False, True])
def test_merged_weights_equal_stock_peft(tmp_path: Path, patterns: bool) -> None:
    base = write_random_checkpoint(tmp_path / "base", experts=EXPERTS, intermediate=96)
    torch.manual_seed(0)
    model = load_base(base, dtype=torch.float32, device="cpu")
    lora = add_lora(model, rank=3, alpha=5, targets=["attention", "experts", "router"], rslora=not patterns)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    save_adapter(lora, tmp_path / "adapter", base=base)
    if patterns:
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        config["alpha_pattern"] = {"q_proj": 2, "layers.1.mlp.experts.down_proj": 9, "mlp.router.weight": 1}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    ids = random_ids(2, 12)
    tuned = PeftModel.from_pretrained(stock_model(base), str(tmp_path / "adapter"))
    merged = stock_model(base)
    deltas = Deltas(Adapter.read(tmp_path / "adapter"), EXPERTS)
    changed = 0
    for name, parameter in merged.named_parameters():
        if (dense := deltas.dense(name)) is not None:
            parameter.data += dense
        elif (factors := deltas.experts(name)) is not None:
            parameter.data += (factors.b @ factors.a).transpose(1, 2)
        else:
            continue
        changed += 1
    assert changed == 2 * 7
    with torch.no_grad():
        assert relative_error(merged(ids).logits, tuned(ids).logits) < 1e-5


def test_a_pattern_counts_for_the_modules_that_it_names_alone() -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}
    assert scale_of(config, "model.layers.0.self_attn.q_proj", 4) == 0.5
    assert scale_of(config, "model.layers.0.self_attn.k_proj", 4) == 2


def test_a_row_by_itself_is_merged_as_among_all_others(tmp_path: Path) -> None:
    base = resolve("nano").base
    weights = Weights(find_subject(write_adapter(tmp_path / "adapter", base, size=0.01), None))
    for name in (f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(4) for part in "qkvo"):
        count = weights.checkpoint.shape(name)[0]
        alone = torch.cat([weights.rows(name, row, row + 1) for row in range(count)])
        assert torch.equal(alone, weights.rows(name, 0, count))
