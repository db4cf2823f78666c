"""metrics.jsonl and what is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from finetune.errors import FinetuneError
from finetune.train.progress import MetricsFile, ProgressDisplay


def state(step: int, *, tokens: int = 0, steps: int = 100) -> Any:
    return SimpleNamespace(
        global_step=step, max_steps=steps, num_input_tokens_seen=tokens, is_world_process_zero=True
    )


def logs(loss: float) -> dict[str, float]:
    return {"loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0, "epoch": 0.1}


def test_a_line_has_the_documented_figures(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.on_train_begin(None, state(0), None)
    metrics.on_log(None, state(0), None, {"eval_loss": 2.5, "epoch": 0})
    metrics.on_log(None, state(1, tokens=512), None, logs(2.0))
    metrics.on_log(None, state(1), None, {"train_runtime": 3.0})
    first, second = [json.loads(line) for line in metrics.file.read_text().splitlines()]
    assert first.keys() == {"step", "eval_loss", "peak_memory_gb"}
    assert second.keys() == {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gb"
    }  # fmt: skip
    assert second["tokens"] == 512 and second["tokens_per_second"] > 0 and second["peak_memory_gb"] > 0


def test_going_on_removes_what_lost_steps_had_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    MetricsFile(file).on_train_begin(None, state(3), None)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, loss: float) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(FinetuneError, match="at step 7: try a smaller"):
        metrics.on_log(None, state(7), None, logs(loss))


def test_without_a_terminal_every_tenth_of_the_run_gets_a_line(tmp_path: Path) -> None:
    out = io.StringIO()
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    display = ProgressDisplay(Console(file=out, width=200), metrics)
    display.on_train_begin(None, state(0), None)
    for step in range(1, 101):
        for callback in (metrics, display):
            callback.on_log(None, state(step, tokens=step), None, logs(1.5))
    display.on_train_end(None, state(100), None)
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert "step 1/100  loss 1.5000" in lines[0] and "left" in lines[0]
    assert "step 100/100" in lines[-1]


def test_on_a_terminal_there_is_a_bar_and_it_goes_away(tmp_path: Path) -> None:
    out = io.StringIO()
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    display = ProgressDisplay(Console(file=out, force_terminal=True, width=120), metrics)
    display.on_train_begin(None, state(0), None)
    for callback in (metrics, display):
        callback.on_log(None, state(5, tokens=10), None, logs(1.25))
    display.close()
    display.close()
    assert "loss 1.2500" in out.getvalue() and "5/100" in out.getvalue()
