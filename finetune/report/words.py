"""Figures as the report says them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from finetune.report.chart import said
from finetune.said import said_bytes

# Names of figures, as people say them; others are shown as they are written, without underscores.
_NAMES = {
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens a second",
    "peak_memory_gb": "peak memory, GB",
}


def said_name(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def said_share(value: float | None) -> str:
    """A score: a percentage where it is a share, else a number."""
    if value is None:
        return "–"
    return f"{value:.1%}" if 0 <= value <= 1 else said(value)


def said_value(value: Any) -> str:
    """Any figure of a record, on one line."""
    if value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return said(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def said_time(seconds: float) -> str:
    """4.2 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def said_when(moment: str) -> str:
    """2026-01-05 14:22 UTC, of an ISO time as run.json has it."""
    try:
        return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M %Z}"
    except (ValueError, TypeError):
        return str(moment)


FILTERS: dict[str, Callable[..., str]] = {
    "name": said_name,
    "number": said,
    "share": said_share,
    "value": said_value,
    "bytes": said_bytes,
    "time": said_time,
    "when": said_when,
}
