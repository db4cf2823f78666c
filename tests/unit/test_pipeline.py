"""What is said after training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from finetune.pipeline import after_training
from finetune.recipe import load_recipe
from finetune.rundir import RunDir
from tests.train_helpers import RECIPE


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return RunDir.create(load_recipe("recipe.yaml"))


def said(run: RunDir) -> str:
    out = io.StringIO()
    after_training(run, Console(file=out, width=1000))
    return out.getvalue()


def test_without_tasks_and_exports_the_losses_and_the_next_commands_are_told(run: RunDir) -> None:
    lines = [
        {"step": 0, "eval_loss": 2.5},
        {"step": 4, "loss": 1.0, "peak_memory_gb": 1.5},
        {"eval_loss": 1.25},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = said(run)
    assert "held-out loss 2.5000 -> 1.2500" in text
    assert "peak memory in training: 1.50 GB" in text
    assert f"finetune chat runs/{run.path.name}\n" in text
    assert run.info()["status"] == "done"
    assert f"report: runs/{run.path.name}/report.html\n" in text and (run.path / "report.html").is_file()


def test_the_sample_is_a_question_that_only_the_tuned_model_answered(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(content: str, right: bool) -> dict[str, object]:
        return {"right": right, "content": content, "tool_calls": []}

    rows = [
        {"question": "1+1?", "base": answer("2", True), "tuned": answer("2", True)},
        {"question": "2+[red]2?", "base": answer("5", False), "tuned": answer("4 " + "x" * 400, True)},
    ]
    (run.eval_dir).mkdir()
    (run.eval_dir / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "recipe.yaml").write_text(
        (run.path / "recipe.yaml").read_text().replace("tasks: []", "tasks: [{name: sums, path: held_out}]")
    )
    monkeypatch.setattr("finetune.evaluate.compare.evaluate", lambda *_, **__: None)
    text = said(run)
    assert "question: 2+[red]2?" in text
    assert "base: 5" in text
    assert "tuned: 4 xxx" in text and "x ..." in text
