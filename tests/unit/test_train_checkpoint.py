"""Checkpoints: whole or absent, without pickle, and exact."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from finetune.errors import FinetuneError
from finetune.train import checkpoint


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: ... (os error 28)")],
)
def test_a_full_disk_leaves_the_earlier_directory_and_no_other(tmp_path: Path, failure: Exception) -> None:
    final = tmp_path / "step-000002"
    with checkpoint.whole_directory(final) as part:
        (part / "weights").write_text("first")
    with pytest.raises(FinetuneError, match="disk is full"), checkpoint.whole_directory(final) as part:
        (part / "weights").write_text("half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert (final / "weights").read_text() == "first"


def test_what_else_goes_wrong_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), checkpoint.whole_directory(tmp_path / "a"):
        raise ZeroDivisionError
    with pytest.raises(PermissionError), checkpoint.whole_directory(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")
    assert not list(tmp_path.iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folders = [tmp_path / f"step-{step:06d}" for step in (2, 4, 6)]
    for folder in folders:
        folder.mkdir()
    checkpoint.keep_newest(folders, 2)
    assert sorted(tmp_path.iterdir()) == folders[1:]


def _trained(kind: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 8))
    model[1].requires_grad_(False)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1, fused=True)
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        optimizer = bitsandbytes.optim.AdamW8bit(model[0].parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    _step(model, optimizer, scheduler, range(steps))
    return model, optimizer, scheduler


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 96, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_optimizer_and_schedule_go_on_bit_for_bit_and_without_pickle(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    model, optimizer, scheduler = _trained(kind, 3)
    checkpoint.save_state(tmp_path, model, optimizer, scheduler, [checkpoint.random_state()])
    again, optimizer2, scheduler2 = _trained(kind, 1)
    again.load_state_dict(model.state_dict())
    checkpoint.load_state(tmp_path, again, optimizer2, scheduler2)
    _step(model, optimizer, scheduler, range(3, 6))
    _step(again, optimizer2, scheduler2, range(3, 6))
    assert scheduler.get_last_lr() == scheduler2.get_last_lr()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model, optimizer, scheduler = _trained("adamw", 1)
    checkpoint.save_state(tmp_path, model, optimizer, scheduler, [])
    layer = nn.Linear(96, 96)
    other = nn.Sequential(layer)
    layer.weight.requires_grad_(False)
    optimizer2 = torch.optim.AdamW([layer.bias], lr=0.1)
    with pytest.raises(FinetuneError, match=r"0\.weight, which is not trained here"):
        checkpoint.load_state(tmp_path, other, optimizer2, LambdaLR(optimizer2, lambda _: 1.0))


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str) -> None:
    model, optimizer, scheduler = _trained("adamw", 1)
    checkpoint.save_state(tmp_path, model, optimizer, scheduler, [])
    (tmp_path / file).write_bytes(b"{")
    with pytest.raises(FinetuneError, match=rf"{file}: this checkpoint cannot be read"):
        checkpoint.load_state(tmp_path, model, optimizer, scheduler)


def test_a_checkpoint_that_does_not_say_where_training_was_is_named(tmp_path: Path) -> None:
    model, optimizer, scheduler = _trained("adamw", 1)
    checkpoint.save_state(tmp_path, model, optimizer, scheduler, [])
    steps = {"global_step": 1, "max_steps": 2, "log_history": []}
    (tmp_path / "trainer_state.json").write_text(json.dumps(steps))
    checkpoint.require_whole(tmp_path)
    for file, content in (("trainer_state.json", "{}"), ("state.json", "[1]")):
        (tmp_path / file).write_text(content)
        with pytest.raises(FinetuneError, match=rf"{file}: .* remove its folder to go on"):
            checkpoint.require_whole(tmp_path)
        (tmp_path / "trainer_state.json").write_text(json.dumps(steps))


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    model, optimizer, scheduler = _trained("adamw", 1)
    checkpoint.save_state(tmp_path, model, optimizer, scheduler, [checkpoint.random_state()])

    def draw() -> list[float]:
        return [random.random(), float(np.random.standard_normal()), torch.rand(1).item()]

    first = draw()
    checkpoint.restore_random_state(tmp_path, rank=0)
    assert draw() == first
    checkpoint.restore_random_state(tmp_path, rank=1)
