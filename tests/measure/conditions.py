"""Where this project's own measurements are kept; what is recorded beside them is `finetune bench`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.bench import conditions as shared
from finetune.bench.conditions import conditions, forget_peak, resident_gib

__all__ = ["REFERENCE", "conditions", "forget_peak", "record", "resident_gib"]

REFERENCE = Path(__file__).resolve().parent.parent.parent / "runs" / "reference"


def record(name: str, command: str, figures: dict[str, Any]) -> Path:
    """Keep figures under runs/reference/ with the command that made them."""
    return shared.record(REFERENCE, name, command, figures)
