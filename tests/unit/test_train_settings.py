"""From a recipe to the trainer's settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.recipe import Recipe, load_recipe
from finetune.train.settings import StepPlan, training_arguments
from finetune.train.surroundings import set_up_wandb
from tests.train_helpers import RECIPE


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("step", "each", "processes", "passes"),
    [(65536, 8192, 1, 8), (65536, 8192, 8, 1), (65536, 8192, 3, 3), (256, 4096, 1, 1), (65536, 8192, 16, 1)],
)
def test_a_step_holds_as_many_passes_as_come_nearest_to_the_tokens_asked_for(
    tmp_path: Path, step: int, each: int, processes: int, passes: int
) -> None:
    keys = (f"train.tokens_per_step={step}", f"train.tokens_per_pass={each}")
    plan = StepPlan.of(recipe(tmp_path, *keys), processes)
    assert plan.passes == passes
    assert plan.tokens_per_step == passes * each * processes


def test_the_plan_says_when_a_step_cannot_have_the_tokens_asked_for(tmp_path: Path) -> None:
    assert "asks for" not in str(StepPlan.of(recipe(tmp_path), 1))
    plan = StepPlan.of(recipe(tmp_path, "train.tokens_per_step=700"), 2)
    assert "1,024 tokens a step" in str(plan)
    assert "the recipe asks for 700" in str(plan)


def test_the_settings_compute_in_the_models_dtype_and_report_to_nobody(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    arguments = training_arguments(made, tmp_path, StepPlan.of(made, 1), held_out=True, going_on=False)
    assert not arguments.bf16 and not arguments.fp16
    assert arguments.report_to == []
    assert arguments.router_aux_loss_coef == 0.0
    assert arguments.eval_on_start
    going_on = training_arguments(made, tmp_path, StepPlan.of(made, 1), held_out=True, going_on=True)
    assert not going_on.eval_on_start


def test_a_package_that_is_missing_is_named_with_the_key_that_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    made = recipe(tmp_path, "train.optimizer=adamw_8bit")
    with pytest.raises(FinetuneError, match=r"train\.optimizer: adamw_8bit needs the package bitsandbytes"):
        training_arguments(made, tmp_path, StepPlan.of(made, 1), held_out=False, going_on=False)


def test_wandb_writes_inside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODE", "DIR", "PROJECT", "SILENT", "LOG_MODEL", "WATCH"):
        monkeypatch.setenv(f"WANDB_{name}", "before")
    set_up_wandb(recipe(tmp_path, "tracking.wandb=offline", "tracking.project=p"), tmp_path / "run")
    import os

    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_DIR"] == str(tmp_path / "run")
    assert os.environ["WANDB_PROJECT"] == "p"
