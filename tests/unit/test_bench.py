"""`finetune bench`: both sides do the same work, are compared rightly, and the figures can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from finetune.bench import compare
from finetune.bench.compare import bench, gradient_agreement
from finetune.bench.random_weights import release_config, write_random_base
from finetune.bench.show import plot, table
from finetune.bench.side import balance, run
from finetune.bench.work import Measured, Side, Work
from finetune.model import add_lora, inspect_checkpoint, load_base, save_adapter
from finetune.predict import gpu
from finetune.recipe import Recipe
from tests.model_kit import random_ids

TINY = release_config(
    hidden=64, intermediate=64, layers=2, experts=4, top_k=2, heads=4, kv_heads=2, head_dim=16, vocab=320,
    sliding_window=8,
) | {"eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "model": {"base": "random", "dense": "float32"},
        "lora": {"rank": 4},
        "data": {"train": "none.jsonl", "max_tokens": 32},
        "train": {"tokens_per_pass": 64, "tokens_per_step": 64},
    }
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("bench")
    write_random_base(folder / "base", TINY)
    torch.manual_seed(0)
    base = load_base(folder / "base", dtype=torch.float32, device="cpu")
    model = add_lora(base, rank=4, alpha=8, targets=["attention", "experts"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    save_adapter(model, folder / "adapter", base=folder / "base")
    return Work(
        str(folder / "base"), str(folder / "adapter"), 4, ["attention", "experts"], "float32", 64, 32,
        steps=2, warm_up=1, routing="natural", checkpointing=True, optimizer="adamw",
    )  # fmt: skip


def test_weights_written_layer_by_layer_are_a_checkpoint(work: Work) -> None:
    info = inspect_checkpoint(Path(work.checkpoint))
    assert (info.kind, info.layers, info.experts) == ("mxfp4", 2, 4)


@pytest.mark.parametrize("routing", ["natural", "balanced"])
def test_both_sides_have_the_same_losses_and_gradients(work: Work, tmp_path: Path, routing: str) -> None:
    asked = Work(**{**vars(work), "routing": routing})
    sides: tuple[Side, ...] = ("finetune", "trl")
    found = {side: run(side, asked, tmp_path / side) for side in sides}
    ours, stock = found["finetune"], found["trl"]
    assert len(ours.step_seconds) == 2 and len(ours.losses) == 3
    assert ours.trained_parameters == stock.trained_parameters
    assert ours.losses == pytest.approx(stock.losses, abs=1e-5)
    agreement = gradient_agreement(*(load_file(tmp_path / side) for side in sides))
    assert agreement["gradient_cosine"] == pytest.approx(1, abs=1e-6)
    assert agreement["gradient_difference"] is not None and agreement["gradient_difference"] < 1e-4


def test_agreement_sees_a_gradient_that_is_off_and_one_that_is_missing() -> None:
    ours = {"a": torch.ones(3), "b": torch.ones(2)}
    assert gradient_agreement(ours, ours) == {"gradient_cosine": 1.0, "gradient_difference": 0.0}
    off = gradient_agreement({**ours, "b": torch.tensor([1.0, 2.0])}, ours)
    assert off["gradient_difference"] == pytest.approx(5**-0.5)
    assert gradient_agreement({"a": torch.ones(3)}, ours)["gradient_cosine"] is None


def test_balanced_routing_gives_every_expert_as_many_tokens(work: Work) -> None:
    model = load_base(Path(work.checkpoint), dtype=torch.float32, device="cpu")
    balance(model)
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[2].flatten().bincount(minlength=4))

    for module in model.modules():
        if isinstance(module, GptOssTopKRouter):
            module.register_forward_hook(note)
    model(input_ids=random_ids(1, 64), use_cache=False)
    assert [counts.tolist() for counts in seen] == [[32] * 4] * 2


def test_a_side_that_fails_is_told_and_the_other_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured([0.5, 0.4, 0.6], [9.0] * 4, 1.5, 0.5, 1.0, 100)

    def side_of(command: list[str], **_: Any) -> Any:
        side, result = command[3], Path(command[5])
        if side == "finetune":
            result.write_text(json.dumps(measured.to_dict()))
        return type("Done", (), {"returncode": 0 if side == "finetune" else -9, "stderr": ""})

    monkeypatch.setattr(compare, "this_machine", lambda dense: gpu("l4"))
    monkeypatch.setattr("finetune.bench.compare.subprocess.run", side_of)
    figures = bench(RECIPE, ["trl"], steps=3, routings=("natural",), config=TINY)
    ours = figures["natural"]["finetune"]
    assert ours["tokens_per_second"] == pytest.approx(64 / 0.5)
    assert ours["memory_gb"] == pytest.approx(1.0)
    assert "memory" in figures["natural"]["trl"]["failed"]
    assert figures["natural"]["against"] == {}
    assert figures["predicted"]["tokens_per_second"] > 0

    console = Console(width=150, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(table(figures))
    shown = console.export_text()
    assert "128" in shown and "predicted" in shown and "lack of memory" in shown
    plot(figures, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
