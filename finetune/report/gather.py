"""What a run directory says of itself, read for the report; nothing is computed anew."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.manifest import MANIFEST
from finetune.report.chart import Chart, draw_series
from finetune.rundir import RunDir

# Of each task: questions that the tuning won, lost, and left wrong.
SAMPLES = {"won": 4, "lost": 3, "wrong": 1}
# What run.json holds in the end; of a run that has just begun, most of it is not there yet.
_INFO = (
    "name", "status", "created", "command", "commit", "base", "data", "hardware", "versions", "seconds",
    "tokens_per_step",
)  # fmt: skip
# What has a chart of its own, or none: counts that only grow.
_NOT_A_SERIES = ("step", "tokens", "eval_loss", "loss")


@dataclass(frozen=True)
class Sample:
    """A question with both answers; `kind` says what the tuning did to it. An answer has the keys of a row
    of eval/<task>.jsonl: content, thinking, tool_calls, right, ended."""

    kind: str
    question: str
    reference: Any
    base: dict[str, Any]
    tuned: dict[str, Any] | None


@dataclass(frozen=True)
class Task:
    """What summary.json says of a task, and samples; `counts` is how often each kind of sample came."""

    name: str
    result: dict[str, Any]
    samples: list[Sample]
    counts: dict[str, int]


@dataclass(frozen=True)
class Export:
    """An export directory inside the run: its record, where it lies, and its bytes."""

    path: str
    format: str
    proof: dict[str, Any]
    bytes: int

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What `finetune verify` found; None before it was asked."""
        found: dict[str, Any] | None = self.proof.get("verified")
        return found


@dataclass(frozen=True)
class Facts:
    """All that the report shows."""

    path: Path
    info: dict[str, Any]
    recipe: str
    last: dict[str, Any]
    held_out: dict[str, float | None]
    tasks: list[Task]
    exports: list[Export]
    charts: list[Chart] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For machines: without charts, samples and the recipe, which have files of their own."""
        exports = [{"path": one.path, "format": one.format, "proof": one.proof} for one in self.exports]
        return {
            "run": str(self.path),
            "status": self.info.get("status"),
            "latest": self.last,
            "held_out_loss": self.held_out,
            "tasks": {task.name: {**task.result, **task.counts} for task in self.tasks},
            "exports": exports,
        }


def gather(run: RunDir) -> Facts:
    """Read a run, also one that has not ended.

    Raises:
        FinetuneError: a file of it cannot be read.
    """
    rows = list(_metrics(run))
    summary = _read(run.eval_dir / "summary.json") if (run.eval_dir / "summary.json").is_file() else {}
    tasks = [_task(run, name, result) for name, result in summary.get("tasks", {}).items()]
    return Facts(
        path=run.path,
        info={**dict.fromkeys(_INFO), **run.info()},
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
        last=run.last_metrics(),
        held_out=summary.get("held_out_loss") or _held_out(rows),
        tasks=tasks,
        exports=[_export(run, file) for file in sorted(run.path.glob(f"export/*/{MANIFEST}"))],
        charts=list(_charts(rows)),
    )


def _metrics(run: RunDir) -> Iterator[dict[str, Any]]:
    if run.metrics.is_file():
        with run.metrics.open(encoding="utf-8") as lines:
            for line in lines:
                # A run that was killed may leave half a line at the end.
                with suppress(ValueError):
                    yield json.loads(line)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FinetuneError(f"this cannot be read: {error}", at=str(file)) from error
    if not isinstance(found, dict):
        raise FinetuneError("this does not hold a mapping", at=str(file))
    return found


def _held_out(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Before and after training, where no evaluation has measured them."""
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return {"base": losses[0] if losses else None, "tuned": losses[-1] if len(losses) > 1 else None}


def _task(run: RunDir, name: str, result: dict[str, Any]) -> Task:
    kept: dict[str, list[Sample]] = {kind: [] for kind in SAMPLES}
    counts = dict.fromkeys(SAMPLES, 0)
    file = run.eval_dir / f"{name}.jsonl"
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                sample = _sample(file, number, line)
                if sample.kind in counts:
                    counts[sample.kind] += 1
                    if len(kept[sample.kind]) < SAMPLES[sample.kind]:
                        kept[sample.kind].append(sample)
    return Task(name, result, [sample for samples in kept.values() for sample in samples], counts)


def _sample(file: Path, number: int, line: str) -> Sample:
    try:
        row = json.loads(line)
        base, tuned = row["base"], row.get("tuned")
        after = (tuned or base)["right"]
        kind = {(False, True): "won", (True, False): "lost", (False, False): "wrong"}.get(
            (base["right"], after)
        )
        return Sample(kind or "kept", row["question"], row.get("reference"), base, tuned)
    except (ValueError, KeyError, TypeError) as error:
        raise FinetuneError(f"not an answer of an evaluation ({error!r})", at=f"{file}:{number}") from error


def _export(run: RunDir, file: Path) -> Export:
    record = _read(file)
    size = sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file())
    where = file.parent.relative_to(run.path).as_posix()
    return Export(where, str(record.get("format")), record.get("proof") or {}, size)


def _charts(rows: list[dict[str, Any]]) -> Iterator[Chart]:
    """Loss in training and on held-out rows together, then every other figure that was written down."""
    both = {"training": _points(rows, "loss"), "held out": _points(rows, "eval_loss")}
    if chart := draw_series("loss", {name: points for name, points in both.items() if points}):
        yield chart
    names = dict.fromkeys(key for row in rows for key in row if key not in _NOT_A_SERIES)
    for name in names:
        if (points := _points(rows, name)) and (chart := draw_series(name, {name: points}, small=True)):
            yield chart


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[name]))
        for row in rows
        if _is_number(row.get("step")) and _is_number(row.get(name))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
