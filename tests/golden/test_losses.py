"""Six steps of training give the losses that were recorded.

A change of the loss, the data, the adapter or the optimizer shows here. Where one is meant, record anew:
`RECORD_GOLDEN=1 pytest tests/golden/test_losses.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from finetune.model import experts
from finetune.model.kernels.budget import Budget
from finetune.model.kernels.steps import TorchSteps
from finetune.model.kernels.wide import Wide
from finetune.train.__main__ import main
from tests.checkpoints import NANO
from tests.train_helpers import read_metrics, write_project

STEPS = 6
# Room for other processors, which sum in another order: Adam's first steps turn the sign of a tiny gradient
# into a whole step. A mistake in mask, scale or schedule changes far more.
RELATIVE = 1e-4
FIGURES = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens")


@pytest.mark.parametrize("base", ["random", "nano"])
def test_losses_are_those_recorded(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Path(__file__).with_name(f"losses-{base}.json")
    recording = os.environ.get("RECORD_GOLDEN") == "1"
    if base == "nano" and not ((NANO / "config.json").is_file() and (golden.is_file() or recording)):
        pytest.skip("the bundled model, or the losses recorded on it, are not there")
    monkeypatch.chdir(tmp_path)
    recipe = write_project(tmp_path)
    keys = [f"train.max_steps={STEPS}", "train.learning_rate=1e-3", *(["model.base=nano"] * (base == "nano"))]
    assert main([str(recipe), *keys]) == 0
    rows = [{k: row[k] for k in FIGURES if k in row} for row in read_metrics(Path("runs/latest"))]
    if recording:
        golden.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    recorded = json.loads(golden.read_text())
    assert len(rows) == len(recorded) == STEPS + 2
    for row, expected in zip(rows, recorded, strict=True):
        assert row == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("base", ["random", "nano"])
def test_the_gpus_products_give_the_same_losses(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run through the expert layer's back end for GPUs, its kernels replaced by plain torch."""
    back_ends = []

    def widened(device: torch.device, dtype: torch.dtype) -> Wide:
        back_ends.append(Wide(TorchSteps(), Budget(1 << 20)))
        return back_ends[-1]

    monkeypatch.setattr(experts, "_back_end_for", widened)
    test_losses_are_those_recorded(base, tmp_path, monkeypatch)
    assert back_ends
