"""Sizes as people say them."""

from __future__ import annotations


def said_bytes(count: float) -> str:
    """13.8 GB, 6.1 MB, 512 B."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
