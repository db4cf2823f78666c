"""`train.profile`: a trace of few steps that other programs read, and a page whose shares add up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.model import add_lora
from finetune.train.profile import RECORDED, StepProfile
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import our_model, random_ids


def train(folder: Path, steps: int) -> None:
    """A training loop that calls back as transformers' trainer does."""
    torch.manual_seed(0)
    base = our_model(write_random_checkpoint(folder / "base"))
    model = add_lora(base, rank=4, alpha=8, targets=["attention", "experts"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = SimpleNamespace(max_steps=steps, global_step=0, is_world_process_zero=True)
    recorder = StepProfile(folder / "profile")
    recorder.on_train_begin(None, state, None)
    ids = random_ids(1, 64)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        recorder.on_step_end(None, state, None, model=model, optimizer=optimizer)
    recorder.on_train_end(None, state, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train(path, steps=6)
    return path


def test_the_trace_holds_a_few_steps_and_is_what_a_browser_reads(folder: Path) -> None:
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")}
    assert len(steps) == RECORDED


def test_the_page_shows_where_a_step_went_and_its_shares_add_up(folder: Path) -> None:
    page = (folder / "profile" / "summary.txt").read_text()
    assert page.startswith(f"{RECORDED} steps of ")
    for part in ("experts, forward", "experts, backward", "attention scores, backward", "update", "the rest"):
        assert part in page
    time = page.split("operators")[0]
    shares = [float(found) for found in re.findall(r"(-?[\d.]+)%", time)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert all(share >= 0 for share in shares)
    assert len(page.splitlines()) < 45, "one page"


def test_the_page_tells_the_sizes_of_what_stays_in_memory(folder: Path) -> None:
    page = (folder / "profile" / "summary.txt").read_text()
    for part in ("packed experts", "dense weights", "adapter", "gradients", "optimizer", "peak"):
        assert re.search(rf"^{part} +[\d.]+", page, re.MULTILINE), part


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps_is_profiled_as_far_as_it_goes(tmp_path: Path, steps: int) -> None:
    train(tmp_path, steps)
    page = (tmp_path / "profile" / "summary.txt").read_text()
    assert page.startswith(f"{min(RECORDED, steps)} steps of ")
