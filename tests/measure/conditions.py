"""Where this project's own measurements are kept; what is recorded beside them is `finetune bench`'s."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.bench import conditions as shared
from finetune.bench.conditions import conditions, forget_peak, resident_gib

__all__ = ["REFERENCE", "conditions", "forget_peak", "print_or_record", "record", "resident_gib"]

REFERENCE = Path(__file__).resolve().parent.parent.parent / "runs" / "reference"


def record(name: str, command: str, figures: dict[str, Any]) -> Path:
    """Keep figures under runs/reference/ with the command that made them."""
    return shared.record(REFERENCE, name, command, figures)


def print_or_record(name: str, command: str, measure: Callable[[], dict[str, Any]]) -> None:
    """The program of a measurement that has one option, `--record`."""
    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    figures = measure()
    print(json.dumps(figures, indent=2))
    if options.record:
        record(name, command, figures)
