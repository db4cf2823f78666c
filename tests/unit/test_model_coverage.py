"""Proof from the run itself that every part of the adapter learns, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.model import CoverageCheck, add_lora, hash_frozen
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import our_model, random_ids

BOTH = ["attention", "experts"]
IDS = random_ids(2, 30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base") / "base", experts=6, top_k=3, hidden=96)


class Steps:
    """Optimiser steps on one batch after the other, with the check before each update."""

    def __init__(self, base: Path, targets: list[str] = BOTH, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = add_lora(our_model(base, dtype), rank=4, alpha=8, targets=targets).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.check = CoverageCheck(self.model)
        self.step = 0

    def loss(self, ids: Tensor = IDS) -> Tensor:
        loss: Tensor = self.model(ids, labels=ids, use_cache=False).loss
        return loss

    def take(self, ids: Tensor = IDS) -> dict[str, int]:
        self.step += 1
        self.optimizer.zero_grad()
        self.loss(ids).backward()
        found = self.check.check(self.step) if self.step <= CoverageCheck.LAST_STEP else {}
        self.optimizer.step()
        return found

    def zero_gradients_of(self, part: str, expert: int) -> None:
        """As a broken kernel would, in layer 1: lora_A has experts by rows, lora_B by columns."""

        def cut(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            if part == "lora_A":
                gradient.view(6, -1)[expert] = 0
            else:
                gradient.view(-1, 6)[:, expert] = 0
            return gradient

        for name, parameter in self.model.named_parameters():
            if f"layers.1.mlp.experts.{part}" in name:
                parameter.register_hook(cut)


@pytest.mark.parametrize("targets", [BOTH, ["experts"], ["attention"], ["attention", "experts", "router"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sound_model_passes(base: Path, targets: list[str], dtype: torch.dtype) -> None:
    steps = Steps(base, targets, dtype)
    found = [steps.take() for _ in range(3)]
    # 6 experts, 2 projections, 2 layers; 60 tokens with 3 experts each reach them all.
    everywhere = 24 if "experts" in targets else 0
    assert found == [{"experts": everywhere, "reached": everywhere}] * 2 + [{}]
    experts = steps.model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    watched = getattr(experts, "get_base_layer", lambda: experts)()
    assert watched.live_experts is None


def test_an_expert_whose_lora_b_gets_no_gradient_stops_the_run(base: Path) -> None:
    steps = Steps(base)
    steps.zero_gradients_of("lora_B", 4)
    with pytest.raises(FinetuneError, match=r"lora_B of expert 4 in .*layers\.1\.mlp\.experts .* step 1"):
        steps.take()


def test_an_expert_whose_lora_a_gets_no_gradient_stops_the_run_at_step_two(base: Path) -> None:
    steps = Steps(base)
    steps.zero_gradients_of("lora_A", 2)
    steps.take()  # lora_B is still zero, so lora_A has no gradient anywhere, and that is as it should be
    with pytest.raises(FinetuneError, match=r"lora_A of expert 2 in .*layers\.1\.mlp\.experts .* step 2"):
        steps.take()


def test_attention_that_gets_no_gradient_stops_the_run(base: Path) -> None:
    steps = Steps(base)
    for name, parameter in steps.model.named_parameters():
        if "layers.0.self_attn.v_proj.lora_B" in name:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(FinetuneError, match=r"v_proj\.lora_B.* has no gradient at step 1"):
        steps.take()


def test_experts_without_a_token_may_be_without_a_gradient(base: Path) -> None:
    found = Steps(base).take(IDS[:1, :2])
    assert found["experts"] == 24 and 0 < found["reached"] < 24


def test_steps_whose_tokens_reach_different_experts_pass(base: Path) -> None:
    """lora_A of an expert can have a gradient only if its lora_B has moved: if step one reached it too."""
    for seed in range(8):
        steps = Steps(base)
        steps.take(random_ids(1, 2, seed=seed))
        steps.take(random_ids(1, 2, seed=seed + 100))


def test_tokens_whose_loss_is_ignored_do_not_count_as_reaching_an_expert(base: Path) -> None:
    steps = Steps(base)
    labels = IDS[:1].clone()
    labels[:, 2:] = -100  # only the first token predicts one that is learned, and no other precedes it
    steps.model(IDS[:1], labels=labels, use_cache=False).loss.backward()
    assert steps.check.check(1)["reached"] == 3 * 2 * 2


def test_three_steps_leave_every_frozen_byte_as_it_was(base: Path) -> None:
    steps = Steps(base, ["attention", "experts", "router"])
    before, loss = hash_frozen(steps.model), steps.loss().item()
    trained = {name: p.detach().clone() for name, p in steps.model.named_parameters() if p.requires_grad}
    for _ in range(3):
        steps.take()
    assert hash_frozen(steps.model) == before
    assert steps.loss().item() < loss
    assert all(not torch.equal(dict(steps.model.named_parameters())[name], p) for name, p in trained.items())


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj_scales", "sinks"])
def test_one_changed_byte_of_the_base_changes_the_hash(base: Path, name: str) -> None:
    model = add_lora(our_model(base), rank=4, alpha=8, targets=BOTH)
    before = hash_frozen(model)
    parameter = next(
        p for n, p in model.named_parameters() if name.split(".")[-1] == n.split(".")[-1] and "layers.1" in n
    )
    parameter.data = parameter.data.clone()
    parameter.data.view(-1).view(torch.uint8)[5] ^= 1
    assert hash_frozen(model) != before
