"""Out of memory on a GPU ends in a sentence that names the setting to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.train import session
from finetune.train.__main__ import main
from tests.train_helpers import write_project

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
)
SAVING = [
    "train.gradient_checkpointing=true", "train.optimizer=adamw_8bit", "train.offload_activations=true",
    "model.dense=nf4", "model.experts_on=host",
]  # fmt: skip
# Each recipe has made use of the settings before; what is named is the next one.
STAGES = [
    (["train.gradient_checkpointing=false"], "train.gradient_checkpointing=true"),
    (["train.tokens_per_pass=1024"], "train.tokens_per_pass=512"),
    ([], "train.optimizer=adamw_8bit"),
    (SAVING[1:2], "train.offload_activations=true"),
    (SAVING[1:3], "model.dense=bf16"),
    (SAVING[1:4], "model.experts_on=host"),
    ([*SAVING, "lora.rank=16"], "lora.rank=8"),
    ([*SAVING, "lora.rank=4"], "nothing in this recipe can be made smaller"),
]


@pytest.mark.parametrize(("overrides", "named"), STAGES)
def test_the_next_setting_that_saves_memory_is_named(
    overrides: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fit(*_: Any) -> None:
        raise torch.OutOfMemoryError(TORCH_SAYS)

    monkeypatch.setattr(session, "fit", fit)
    monkeypatch.chdir(tmp_path)
    recipe = write_project(tmp_path)
    assert main([str(recipe), *overrides]) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    start = "the GPU ran out of memory in training (tried to allocate 2.00 GiB); "
    assert sentence.startswith(start + named) and "\n" not in sentence
    run = json.loads((tmp_path / "runs/latest/run.json").read_text())
    assert run["status"] == "failed" and run["error"] == sentence
