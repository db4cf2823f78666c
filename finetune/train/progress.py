"""What a run tells while it trains: metrics.jsonl, and a bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from finetune.errors import FinetuneError, writing

# ru_maxrss counts KiB, on macOS bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory_gb() -> float:
    """The most memory in use so far, in 10^9 bytes: of the GPU, or else of the process (mapped files too)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9


class MetricsFile(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Appends a line a step to metrics.jsonl, and stops the run when the loss is no number.

    Time for evaluating and saving is not counted in tokens_per_second. When a run goes on from a checkpoint,
    lines that a later, lost step had written are removed first.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.latest: dict[str, float] = {}
        self._clock = time.perf_counter()
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tokens = state.num_input_tokens_seen
        if state.is_world_process_zero and self.file.exists():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= state.global_step]
            part = self.file.with_suffix(".jsonl.part")
            with writing(self.file):
                part.write_text("".join(kept), encoding="utf-8")
                os.replace(part, self.file)
        self._clock = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs and "eval_loss" not in logs:
            return
        line: dict[str, float] = {"step": state.global_step}
        if "loss" in logs:
            now, tokens = time.perf_counter(), state.num_input_tokens_seen
            line |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            line["tokens"] = tokens
            line["tokens_per_second"] = round((tokens - self._tokens) / max(now - self._clock, 1e-9), 1)
            self._clock, self._tokens = now, tokens
        else:
            line["eval_loss"] = logs["eval_loss"]
        line["peak_memory_gb"] = round(peak_memory_gb(), 3)
        self.latest |= line
        if state.is_world_process_zero:
            with writing(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if not math.isfinite(line.get("loss", 0.0)):
            raise FinetuneError(
                f"the loss is {line['loss']} at step {state.global_step}: try a smaller train.learning_rate"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()

    def _lines(self) -> list[str]:
        """Whole lines only: a process that was killed may have left half of one."""
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """A bar on a terminal, a line for every tenth of the run elsewhere; held-out losses always get a line."""

    def __init__(self, console: Console, metrics: MetricsFile) -> None:
        self.console, self.metrics = console, metrics
        self._bar: Progress | None = None
        self._started, self._first, self._next_line = 0.0, 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._first = time.monotonic(), state.global_step
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, figures=""
            )
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        latest = self.metrics.latest
        figures = (
            f"loss {latest['loss']:.4f}  {latest['tokens_per_second']:,.0f} tokens/s  "
            f"{latest['peak_memory_gb']:.1f} GB"
        )
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, figures=figures)
        elif state.global_step >= self._next_line or state.global_step == state.max_steps:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {figures}  {self._left(state)}")
            self._next_line = state.global_step + max(1, state.max_steps // 10)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        return f"{_duration(seconds)} left" if seconds else "done"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
