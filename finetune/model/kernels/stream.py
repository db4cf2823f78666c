"""Packed experts that stay in host memory, brought to the GPU a few at a time while others are worked on.

Two buffers take turns: what is worked on is in one, and what was asked for after it in the step before is on
its way into the other, on a stream of its own. So no order of layers or experts is built in; the first step
finds it out. Copies hide behind the products once those take longer; `transfer_seconds` says how long they
take.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Hashable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from finetune.errors import FinetuneError

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
        # Requests whose bytes were there or on their way, and those that waited.
        self.hits, self.misses = 0, 0
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


def require_host_memory(packed_bytes: int) -> None:
    """Raise FinetuneError where the experts would not fit: the system would end the process."""
    free = psutil.virtual_memory().available
    if packed_bytes > free:
        sentence = f"model.experts_on: host keeps {packed_bytes / 1e9:.1f} GB of experts in host memory"
        raise FinetuneError(f"{sentence}, and {free / 1e9:.1f} GB of it are free here")


class _Pinned(mmap.mmap):
    """Memory that the GPU reads by itself until the last tensor over it is gone.

    Given back while it is registered, it would be registered again at the same address for another model,
    and copies would bring what lay there before.
    """

    address: int | None = None

    def register(self, address: int) -> int:
        """CUDA's error code, 0 where it worked."""
        failed = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        self.address = None if failed else address
        return failed

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def pin(tensor: Tensor) -> Tensor:
    """A copy in host memory that the GPU reads by itself, or in ordinary memory where that is refused.

    Registered rather than allocated as pinned: torch's allocator would round 1.06 GB up to 2.
    """
    if not torch.cuda.is_available():
        return tensor.detach().clone()
    memory = _Pinned(-1, tensor.nbytes)
    with suppress(OSError):  # pages of 2 MiB are pinned sooner than those of 4 KiB; not every system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.shape)
    copy.copy_(tensor.detach())
    failed = memory.register(copy.data_ptr())
    if failed:
        # CUDA would report it once more at the next launch, as an error of that.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        _warn_of_slow_copies(failed)
    return copy


@cache
def _warn_of_slow_copies(code: int) -> None:
    logger.warning(
        "the system refuses to pin host memory (CUDA error %d): experts come to the GPU more slowly; a "
        "higher limit of locked memory (ulimit -l, or the container's memlock) may help",
        code,
    )
