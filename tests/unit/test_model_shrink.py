"""Attention in NF4 and the embedding on the host: what is there, that it trains, that it stays."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import FinetuneError
from finetune.model import add_lora, hash_frozen, load_base
from finetune.model.shrink import HostEmbedding, keep_embedding_on_host
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import random_ids

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base", layers=2)


def base(checkpoint: Path, *, nf4: bool) -> Any:
    return load_base(checkpoint, dtype=torch.bfloat16, device="cpu", nf4=nf4)


def losses(checkpoint: Path, *, nf4: bool, steps: int = 6) -> list[float]:
    """Of a few steps on the same tokens, LoRA on attention alone."""
    torch.manual_seed(0)
    model = add_lora(base(checkpoint, nf4=nf4), rank=4, alpha=8, targets=["attention"]).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    ids, found = random_ids(1, 40), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_attentions_projections_are_nf4_and_nothing_else_is(checkpoint: Path) -> None:
    model = base(checkpoint, nf4=True)
    packed = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert packed == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in ("q", "k", "v", "o")
    }
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4"
    assert model.lm_head.weight.dtype == torch.bfloat16
    dense = base(checkpoint, nf4=False).model.layers[0].self_attn.q_proj.weight.float()
    error = (bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state).float() - dense).norm()
    assert 0 < error < 0.15 * dense.norm(), "a grid of 16 values is about a tenth off"


def test_lora_learns_over_nf4_almost_as_over_bfloat16(checkpoint: Path) -> None:
    dense, packed = losses(checkpoint, nf4=False), losses(checkpoint, nf4=True)
    assert packed[-1] < packed[0] - 0.1
    # What NF4 rounds off moves the loss by less than a tenth of what is learned.
    learned = dense[0] - dense[-1]
    assert all(abs(a - b) < 0.1 * learned for a, b in zip(dense, packed, strict=True))


def test_the_adapter_over_nf4_stays_float32_and_is_not_taken_for_quantised(checkpoint: Path) -> None:
    model = add_lora(base(checkpoint, nf4=True), rank=4, alpha=8, targets=["attention", "experts"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    # TRL would cast the adapter of a model with this mark to bfloat16.
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_training_goes_on_after_an_evaluation(checkpoint: Path) -> None:
    model = add_lora(base(checkpoint, nf4=True), rank=4, alpha=8, targets=["attention"])
    with torch.no_grad():
        model.eval()(input_ids=random_ids(1, 20))
    loss = model.train()(input_ids=random_ids(1, 20), labels=random_ids(1, 20), use_cache=False).loss
    loss.backward()
    assert loss.isfinite()


def test_training_over_nf4_changes_nothing_that_is_frozen(checkpoint: Path) -> None:
    model = add_lora(base(checkpoint, nf4=True), rank=4, alpha=8, targets=["attention"]).train()
    before = hash_frozen(model)
    model(input_ids=random_ids(1, 20), labels=random_ids(1, 20), use_cache=False).loss.backward()
    assert hash_frozen(model) == before


def test_the_embedding_stays_on_the_host_when_the_model_moves(checkpoint: Path) -> None:
    model = base(checkpoint, nf4=False)
    keep_embedding_on_host(model)
    model.to("meta")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding) and embedding.weight.device.type == "cpu"
    assert model.lm_head.weight.device.type == "meta"
    assert embedding(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, embedding.embedding_dim)


def test_nf4_without_bitsandbytes_is_refused_in_a_sentence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(FinetuneError, match="nf4 needs the package bitsandbytes, which does not load"):
        base(checkpoint, nf4=True)
