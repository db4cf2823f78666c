"""LoRA in PEFT's stock layout on packed experts: what it computes and what it saves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.model import add_lora, load_adapter, load_model, save_adapter
from finetune.model.lora import ATTENTION_MODULES, EXPERT_PARAMETERS
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import our_model, random_ids, stock_model

BOTH = ["attention", "experts"]
IDS = random_ids(2, 30)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    return write_random_checkpoint(path, experts=6, top_k=3, hidden=96, tokenizer="bytes")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "base"
    return write_random_checkpoint(path, experts=6, top_k=3, hidden=96, tokenizer="bytes", seed=1)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as large as a real one, as we save it."""
    path = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(adapted(base), path, base=base)
    return path


def adapted(base: Path, *, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    model = add_lora(our_model(base), **{"rank": 4, "alpha": 8, "targets": BOTH, **settings})
    randomise(model, "lora_B")
    return model


def randomise(model: Any, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data.normal_(std=0.05)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def trained_loss(model: Any) -> Tensor:
    loss: Tensor = model(IDS, labels=IDS, use_cache=False).loss
    return loss


# What it computes


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3},
        {"rank": 8, "alpha": 20},
        {"rank": 12, "alpha": 7.5, "rslora": True},
        {"targets": ["experts"]},
        {"targets": ["attention"]},
        {"targets": ["attention", "experts", "router"]},
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_stock_peft(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ours = adapted(base, **settings)
    assert (logits(ours) - logits(our_model(base))).abs().max() > 0.01
    save_adapter(ours, tmp_path, base=base)
    stock = PeftModel.from_pretrained(stock_model(base), str(tmp_path), is_trainable=True)
    assert (logits(ours) - logits(stock)).abs().max() < 1e-5
    trained_loss(ours).backward()
    trained_loss(stock).backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() < 1e-5 * expected[name].abs().max() + 1e-8, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_new_adapter_changes_nothing_and_is_float32(base: Path, dtype: torch.dtype) -> None:
    plain = our_model(base, dtype)
    expected = logits(plain)
    model = add_lora(plain, rank=4, alpha=8, targets=BOTH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert torch.equal(logits(model), expected)


def test_only_the_adapter_is_trained(base: Path) -> None:
    model = adapted(base, targets=["attention", "experts", "router"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    # In each of 2 layers A and B on q, k, v, o, on gate_up and down of the experts, and on the router.
    assert len(trained) == 2 * 2 * (4 + 2 + 1)


def test_with_the_adapter_off_the_model_is_exactly_the_base(base: Path) -> None:
    model = adapted(base, targets=["attention", "experts", "router"])
    with model.disable_adapter():
        off = logits(model)
    assert torch.equal(off, logits(our_model(base)))
    assert not torch.equal(logits(model), off)


def test_two_adapters_at_once_add_up_as_in_stock_peft(base: Path, saved: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, seed=5, rank=3), tmp_path, base=base)
    ours = load_adapter(our_model(base), saved, base=base)
    first_alone = logits(ours)
    ours.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits(ours), first_alone)
    stock = PeftModel.from_pretrained(stock_model(base), str(saved))
    stock.load_adapter(str(tmp_path), "second")
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "second"])
    assert (logits(ours) - logits(stock)).abs().max() < 1e-5
    assert (logits(ours) - first_alone).abs().max() > 0.01
    ours.set_adapter("second")
    assert (logits(ours) - logits(load_adapter(our_model(base), tmp_path, base=base))).abs().max() < 1e-6


def test_merging_into_packed_experts_is_refused(base: Path) -> None:
    with pytest.raises(FinetuneError, match="packed experts cannot take an adapter in"):
        adapted(base).merge_and_unload()


# Saving and loading


def test_what_is_saved_is_loaded_bit_for_bit(base: Path, saved: Path) -> None:
    loaded = load_adapter(our_model(base), saved, base=base)
    assert torch.equal(logits(loaded), logits(adapted(base)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    weights = dict(adapted(base).named_parameters())
    found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in found.items())


def test_a_loaded_adapter_can_be_trained_further(base: Path, saved: Path) -> None:
    model = load_adapter(our_model(base, torch.bfloat16), saved, base=base, trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    trained_loss(model).backward()
    assert all(parameter.grad is not None for parameter in trained.values())


def test_an_adapter_directory_names_its_own_base(base: Path, saved: Path) -> None:
    model, _ = load_model(saved, dtype=torch.float32, device="cpu")
    assert torch.equal(logits(model), logits(adapted(base)))


def test_the_record_names_the_base_as_the_user_did(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base), tmp_path, base=base, where="openai/gpt-oss-20b")
    assert json.loads((tmp_path / "finetune_base.json").read_text())["where"] == "openai/gpt-oss-20b"
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "openai/gpt-oss-20b"
    assert config["target_parameters"] == EXPERT_PARAMETERS


def test_the_adapter_of_other_weights_is_refused(base: Path, other_base: Path, saved: Path) -> None:
    with pytest.raises(FinetuneError, match="this adapter was trained on other weights") as refused:
        load_adapter(our_model(other_base), saved, base=other_base)
    assert str(base) in str(refused.value) and str(other_base) in str(refused.value)


def test_a_stock_adapter_without_a_record_loads_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=ATTENTION_MODULES, target_parameters=EXPERT_PARAMETERS
    )
    stock = get_peft_model(stock_model(base), config)
    randomise(stock, "lora_B")
    stock.save_pretrained(str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="finetune.model.lora"):
        ours = load_adapter(our_model(base), tmp_path, base=base)
    assert "does not say which weights it was trained on" in caplog.text
    assert (logits(ours) - logits(stock)).abs().max() < 1e-5


def test_our_own_adapter_loads_without_a_warning(
    base: Path, saved: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    load_adapter(our_model(base), saved, base=base)
    assert not caplog.records and not [w for w in recwarn if "adapter" in str(w.message)]


def edit_config(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(config | change))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})

    return edit


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda adapter: (adapter / name).write_bytes(content)


LAYER = "base_model.model.model.layers.1."
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "no adapter here"),
    "no config": (lambda adapter: (adapter / CONFIG).unlink(), "no adapter here"),
    "garbage": (write(WEIGHTS, b"\xff" * 1000), "does not load"),
    "empty": (write(WEIGHTS, b""), "does not load"),
    "cut off": (
        lambda adapter: (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100]),
        "does not load",
    ),
    "config cut off": (write(CONFIG, b"{"), "not a readable LoRA configuration"),
    "config a list": (write(CONFIG, b"[]"), "not a readable LoRA configuration"),
    "config empty": (write(CONFIG, b"{}"), "does not load"),
    "config not text": (write(CONFIG, b"\xff\xfe\xff"), "not a readable LoRA configuration"),
    "another kind": (
        write(CONFIG, json.dumps({"peft_type": "IA3", "target_modules": ["k_proj"]}).encode()),
        "another kind than LoRA",
    ),
    "rank of text": (edit_config({"r": "four"}), "does not load"),
    "rank of others": (edit_config({"r": 5}), "size mismatch for base_model"),
    "dropout": (edit_config({"lora_dropout": 0.1}), "does not load"),
    "target nowhere": (edit_config({"target_modules": ["no_proj"]}), "which has no place on this base"),
    "a weight missing": (
        edit_weights(lambda t: t.pop(LAYER + "mlp.experts.lora_B.weight")),
        "lacks 'base_model.model.model.layers.1.mlp.experts.lora_B",
    ),
    "all weights missing": (edit_weights(lambda t: t.clear()), "lacks 'base_model"),
    "a layer too many": (
        edit_weights(lambda t: t.update({LAYER.replace("1", "7") + "x.lora_A.weight": torch.zeros(2)})),
        "layers.7.x",
    ),
    "record cut off": (write("finetune_base.json", b"{"), "the record of the adapter's base is not readable"),
    "record a list": (write("finetune_base.json", b"[]"), "the record of the adapter's base is not readable"),
    "record empty": (write("finetune_base.json", b"{}"), "the record of the adapter's base is not readable"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_adapter_is_refused_in_a_sentence(
    base: Path, saved: Path, tmp_path: Path, kind: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in saved.iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    spoil, words = SPOILED[kind]
    spoil(adapter)
    with pytest.raises(FinetuneError) as refused:
        load_adapter(our_model(base), adapter, base=base)
    sentence = str(refused.value)
    assert words in sentence and str(adapter) in sentence and "\n" not in sentence
