"""The run directory: made whole, found again, listed, and honest about a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.rundir import RunDir, cache_folder, recipe_of


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {"name": "mine", "model": {"base": "nano"}, "data": {"train": [{"path": "/rows.jsonl"}]}}
    )


def test_a_new_run_has_its_recipe_and_a_status(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(recipe, tmp_path / "runs")
    assert run.path.name.startswith("mine-")
    assert run.recipe() == recipe
    assert (run.info()["name"], run.info()["status"]) == ("mine", "created")


def test_latest_is_the_newest_run_even_within_one_second(tmp_path: Path, recipe: Recipe) -> None:
    runs = [RunDir.create(recipe, tmp_path) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert RunDir.open(tmp_path / "latest") == runs[-1]
    assert sorted(run.path for run in RunDir.all(tmp_path)) == sorted(run.path for run in runs)


def test_updates_are_merged_and_leave_no_other_file(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(recipe, tmp_path)
    run.update(status="training", data={"rows": 3})
    run.update(status="trained")
    assert (run.info()["status"], run.info()["data"], run.info()["name"]) == ("trained", {"rows": 3}, "mine")
    assert sorted(path.name for path in run.path.iterdir()) == ["recipe.yaml", "run.json"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(recipe, tmp_path)
    assert run.checkpoints() == [] and run.latest_checkpoint() is None
    for name in ("step-000200", "step-1000000", "step-000090", "step-000300.part", "notes"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in run.checkpoints()] == ["step-000090", "step-000200", "step-1000000"]
    assert run.latest_checkpoint() == run.path / "checkpoints" / "step-1000000"


def test_the_latest_figures_survive_a_line_that_was_cut_off(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(recipe, tmp_path)
    assert run.last_metrics() == {}
    run.metrics.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 1, "eval_loss": 3.0}\n{"step": 2, "loss": 1.5}\n{"st'
    )
    assert run.last_metrics() == {"step": 2, "loss": 1.5, "eval_loss": 3.0}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="this folder is not a run"):
        RunDir.open(tmp_path)
    with pytest.raises(FinetuneError, match="there is no such run"):
        RunDir.open(tmp_path / "nowhere")
    assert RunDir.all(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_run_json_is_named(tmp_path: Path, recipe: Recipe, content: str) -> None:
    run = RunDir.create(recipe, tmp_path)
    (run.path / "run.json").write_text(content)
    with pytest.raises(FinetuneError, match=r"run\.json: run\.json "):
        run.info()


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "no space is left on this disk; free some and run again"),
        (errno.EDQUOT, "no space is left on this disk; free some and run again"),
        (errno.EACCES, "this cannot be written: Permission denied"),
    ],
)
def test_a_disk_that_cannot_be_written_is_said_in_a_sentence(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    run = RunDir.create(recipe, tmp_path / "runs")
    before = (run.path / "run.json").read_text()

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(number, "Permission denied")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FinetuneError) as at_start:
        RunDir.create(recipe, tmp_path / "runs")
    with pytest.raises(FinetuneError) as later:
        run.update(status="trained")
    assert at_start.value.sentence == later.value.sentence == sentence
    assert json.loads((run.path / "run.json").read_text()) == json.loads(before)


def test_runs_share_a_cache_that_the_environment_may_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINETUNE_CACHE", raising=False)
    assert cache_folder() == Path("runs/.cache")
    assert RunDir(tmp_path / "runs" / "one").cache == tmp_path / "runs" / ".cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert cache_folder() == RunDir(tmp_path / "runs" / "one").cache == tmp_path


def test_the_recipe_of_a_run_and_of_a_file_are_found_and_of_nothing_else(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for where, sentence in ((tmp_path, "this folder is not a run"), (missing, "no such recipe or run")):
        with pytest.raises(FinetuneError, match=sentence):
            recipe_of(where)
