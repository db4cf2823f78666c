"""How much one server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`batch` requests are answered at once and `queue` more wait; each may have `context` tokens.

    `context` None is the model's own; `cache_gb` None is a share of the free memory.
    """

    batch: int = 32
    queue: int = 256
    context: int | None = None
    cache_gb: float | None = None
