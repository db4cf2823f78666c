"""Packed experts that stay in host memory, brought to the GPU a few at a time while others are worked on.

Two buffers take turns: what is worked on is in one, and what was asked for after it in the step before is on
its way into the other, on a stream of its own. So no order of layers or experts is built in; the first step
finds it out. Copies hide behind the products once those take longer; `transfer_seconds` says how long they
take.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Experts on their way together: 8 of gpt-oss are 106 MB, 2 ms on PCIe 5: long enough for the link's rate.
EXPERTS = 8


def transfer_seconds(packed_bytes: float, bytes_per_second: float) -> float:
    """How long the copies of a step take: every expert once forward and once backward."""
    return 2 * packed_bytes / bytes_per_second


@dataclass
class _Buffer:
    memory: list[Tensor] = field(default_factory=list)
    key: Hashable = None
    filled: Any = None  # events of the GPU
    free: Any = None


class ExpertStream:
    """Shared by the layers of a model; on a CPU the copies are there, but nothing runs beside them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.hits, self.misses = (
            0,
            0,
        )  # requests whose bytes were there or on their way, and those that waited
        self._queue = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._current, self._next = _Buffer(), _Buffer()
        self._sources: dict[Hashable, Sequence[Tensor]] = {}
        self._follows: dict[Hashable, Hashable] = {}

    def fetch(self, key: Hashable, sources: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `sources` (uint8, host) on the device, to be read before `release` is called.

        `key` names these tensors and what they are wanted for: what is asked for next can so be foreseen.
        """
        if self._current.key is not None:
            self._follows[self._current.key] = key
        self._sources[key] = sources
        self._current, self._next = self._next, self._current
        if self._current.key == key:
            self.hits += 1
        else:
            self.misses += 1
            self._copy(self._current, key)
        if self._queue is not None:
            torch.cuda.current_stream(self.device).wait_event(self._current.filled)
        following = self._follows.get(key)
        if following is not None:
            self._copy(self._next, following)
        return [
            memory[: source.numel()].view(source.shape)
            for memory, source in zip(self._current.memory, sources, strict=True)
        ]

    def release(self) -> None:
        """What was fetched last has been read by everything that was launched so far."""
        if self._queue is not None:
            self._current.free = torch.cuda.current_stream(self.device).record_event()

    def _copy(self, buffer: _Buffer, key: Hashable) -> None:
        sources = self._sources[key]
        sizes = [source.numel() for source in sources]
        room = [memory.numel() for memory in buffer.memory] or [0] * len(sizes)
        if any(have < size for have, size in zip(room, sizes, strict=True)):
            # Memory that copies of another stream write to, and that may be in use still.
            if self._queue is not None:
                torch.cuda.synchronize(self.device)
            buffer.memory = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
            buffer.free = None
            if self._queue is not None:
                self._queue.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._queue) if self._queue is not None else nullcontext():
            if self._queue is not None and buffer.free is not None:
                self._queue.wait_event(buffer.free)
            for memory, source in zip(buffer.memory, sources, strict=True):
                memory[: source.numel()].copy_(source.reshape(-1), non_blocking=True)
            if self._queue is not None:
                buffer.filled = self._queue.record_event()
        buffer.key = key


def pin(tensor: Tensor) -> Tensor:
    """A copy in host memory that the GPU reads by itself, or in ordinary memory where that is refused.

    Registered rather than allocated as pinned: torch's allocator would round 1.06 GB up to 2.
    """
    copy = tensor.detach().clone()
    if not torch.cuda.is_available():
        return copy
    failed = int(torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0))
    if failed:
        logger.warning("host memory cannot be pinned (CUDA error %d): experts are copied more slowly", failed)
    return copy
