"""What follows training: measure base against tuned, export, and say how it went."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli_common import said_bytes
from finetune.errors import FinetuneError
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.evaluate.summary import Summary

# Bytes in float32 up to which exports are judged at once, which then takes seconds. `finetune verify` is for
# larger models: it needs the whole of one in memory.
VERIFIED_UP_TO = 1 << 30
# A sample is shown whole up to here; beyond it the table of figures would scroll out of sight.
SAMPLE_LETTERS = 300


def after_training(run: RunDir, console: Console) -> dict[str, Any]:
    """Evaluate and export a trained run as its recipe says, and print the outcome.

    Returns what summary.json says, the export directories, and the seconds that each stage took.

    Raises:
        FinetuneError: a task or an export fails; run.json keeps the status of the last stage that ended well.
    """
    recipe, seconds = run.recipe(), dict(run.info().get("seconds", {}))
    run.update(status="trained")
    summary: Summary | None = None
    if recipe.eval.tasks:
        from finetune.evaluate.compare import evaluate

        with _timed(seconds, "evaluation"):
            summary = evaluate(run.path, console=console)
        run.update(status="evaluated", seconds=seconds)
    exports: dict[str, str] = {}
    for format_ in recipe.export.formats:
        out = run.path / "export" / format_
        with _timed(seconds, f"export of {format_}"):
            proven = _export(run, format_, out)
        console.print(f"export ({format_}): {proven}", markup=False)
        exports[format_] = str(out)
    run.update(status="done", seconds=seconds)
    _tell(run, summary, exports, seconds, console)
    return {**(summary.to_dict() if summary else {}), "exports": exports, "seconds": seconds}


def _export(run: RunDir, format_: str, out: Path) -> str:
    """Export, have a small model judged at once, and say what that proves.

    Raises:
        FinetuneError: the export fails, or its judge finds another model in it.
    """
    from finetune.export import export
    from finetune.export.proof import in_words
    from finetune.export.verify import can_verify, verify
    from finetune.manifest import read_manifest
    from finetune.model import resolve

    export(run.path, format_, out, force=True)
    if can_verify(format_, resolve(run.recipe().model.base).base, VERIFIED_UP_TO):
        verdict = verify(out, against=str(run.path))
        if not verdict.passed:
            raise FinetuneError(
                f"{verdict.judge} does not find the tuned model in this export; finetune verify shows more",
                at=str(out),
            )
    return in_words(read_manifest(out))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 1)


def _tell(
    run: RunDir,
    summary: Summary | None,
    exports: dict[str, str],
    seconds: dict[str, float],
    console: Console,
) -> None:
    console.print()
    if summary:
        console.print(summary.table())
    losses = _held_out_losses(run)
    if not summary and len(losses) > 1:
        console.print(f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    console.print("time: " + ", ".join(f"{stage} {_duration(took)}" for stage, took in seconds.items()))
    sizes = {"adapter": run.adapter, **{f"export ({name})": Path(path) for name, path in exports.items()}}
    console.print("size: " + ", ".join(f"{name} {said_bytes(_size(path))}" for name, path in sizes.items()))
    if memory := run.last_metrics().get("peak_memory_gb"):
        console.print(f"peak memory in training: {memory:.2f} GB")
    sample = _sample(run)
    if sample:
        console.print("\na question that the base got wrong and the tuned model right:")
        for who, text in sample.items():
            # Not markup: an answer may hold square brackets.
            console.print(f"  {who:>8}: {text}", markup=False)
    here = os.path.relpath(run.path)
    from finetune.report import write_report

    console.print(f"\nreport: {os.path.relpath(write_report(run.path))}", markup=False)
    console.print("\ntry next:")
    for command in (
        f"finetune chat {here}",
        f"finetune eval {here}",
        f"finetune export {here} --to adapter --out my-adapter",
    ):
        console.print(f"  {command}", markup=False)


def _sample(run: RunDir) -> dict[str, str]:
    """The first question of any task that only the tuned model answered, with both answers."""
    for task in run.recipe().eval.tasks:
        file = run.eval_dir / f"{task.name}.jsonl"
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["tuned"]["right"] and not row["base"]["right"]:
                answers = {who: _shown(row[who]) for who in ("base", "tuned")}
                return {"question": _short(row["question"]), **answers}
    return {}


def _shown(answer: dict[str, Any]) -> str:
    calls = [f"{call['name']}({call['arguments']})" for call in answer["tool_calls"]]
    return _short(" ".join([answer["content"], *calls]).strip() or "(nothing)")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_LETTERS else text[:SAMPLE_LETTERS] + " ..."


def _held_out_losses(run: RunDir) -> list[float]:
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []
    return [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
