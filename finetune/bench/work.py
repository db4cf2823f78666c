"""What both sides of a benchmark are given, and what each gives back; plain JSON between processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Side = Literal["finetune", "trl", "unsloth"]
Routing = Literal["natural", "balanced"]


@dataclass(frozen=True)
class Work:
    """Steps of one pass each, of `tokens` tokens in documents of `document` tokens; every token is learned.

    `dtype` is that of the dense weights and of the computation, `threads` 0 leaves torch's own number.
    """

    checkpoint: str
    adapter: str
    rank: int
    targets: list[str]
    dtype: Literal["bfloat16", "float32"]
    tokens: int
    document: int
    steps: int
    warm_up: int
    routing: Routing
    checkpointing: bool
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
    threads: int = 0

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Work:
        return cls(**json.loads(file.read_text()))


@dataclass(frozen=True)
class Measured:
    """One side. Seconds are those of the steps after the warm-up; memory is in 10^9 bytes.

    On a GPU memory is what torch had allocated at most. On a CPU it is what was resident at most, mapped
    files and libraries included; `libraries_gb` was resident before the model was loaded. Loading is apart.
    """

    step_seconds: list[float]
    losses: list[float]
    peak_gb: float
    libraries_gb: float
    loading_peak_gb: float
    trained_parameters: int
    conditions: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
