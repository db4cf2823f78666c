"""Keep a run's curve and outcome under runs/reference/.

python -m tests.measure.keep_run RUN NAME
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from finetune.rundir import RunDir
from tests.measure.conditions import record

KEPT = ("status", "seconds", "tokens_per_step", "data", "frozen", "coverage")


def gather(run: RunDir) -> dict[str, Any]:
    """What the run measured: held-out losses by step, every loss, the comparison, the frozen hashes."""
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    summary = run.eval_dir / "summary.json"
    return {
        **{key: run.info()[key] for key in KEPT if key in run.info()},
        "held_out_loss": {row["step"]: round(row["eval_loss"], 4) for row in rows if "eval_loss" in row},
        "loss": [round(row["loss"], 4) for row in rows if "loss" in row],
        "peak_memory_gb": max(
            (row["peak_memory_gb"] for row in rows if "peak_memory_gb" in row), default=None
        ),
        "evaluation": json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("name")
    options = parser.parse_args()
    run = RunDir.open(options.run)
    words = run.info().get("command") or "finetune train"
    print(record(options.name, words if isinstance(words, str) else " ".join(words), gather(run)))


if __name__ == "__main__":
    main()
