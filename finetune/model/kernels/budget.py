"""How many experts, and how many of their rows, to work on at once, from the memory that is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Enough for products that fill a GPU: 40 experts of gpt-oss decoded, or one with 40,000 rows in backward.
WORK_BYTES = 2 << 30
# The layer takes at most this part of what is free: layers to come and the optimizer need the rest.
SHARE_OF_FREE = 4
# Decoding more experts at once than these only adds scratch: their rows fill the machine already.
MOST_EXPERTS = 32
# Fewer rows a product than these leave a GPU idle, whatever memory says.
FEWEST_ROWS = 1024


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a GPU, under the limit set for this process; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return max(0, min(free + unused, int(limit) - allocated))


class Chunk(NamedTuple):
    """Experts `[first, last)` decoded together, and their sorted rows cut into `parts`."""

    first: int
    last: int
    parts: list[slice]


@dataclass
class Budget:
    """Bytes for a layer's scratch and rows."""

    bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Budget:
        free = free_bytes(device)
        return cls(WORK_BYTES if free is None else min(WORK_BYTES, free // SHARE_OF_FREE))

    def halve(self, expert_bytes: int) -> bool:
        """Try with less; False where it is down to one expert and the fewest rows at a time."""
        if self.bytes <= expert_bytes:
            return False
        self.bytes //= 2
        return True

    def chunks(
        self, ends: Sequence[int], expert_bytes: int, row_bytes: int, experts: int | None = None
    ) -> Iterator[Chunk]:
        """As many experts at a time as fit with their rows, one at least; those without rows are passed over.

        `ends [E]` says where each expert's sorted rows end; `expert_bytes` is the scratch of one expert and
        `row_bytes` what a row takes at the layer's peak. `experts`: as many at a time, whatever fits.
        """
        rows_at_once = max(FEWEST_ROWS, (self.bytes - expert_bytes) // row_bytes)
        first = start = 0
        for last in range(1, len(ends) + 1):
            # Would the next expert still fit?
            size, end = last + 1 - first, ends[min(last, len(ends) - 1)]
            fits = size * expert_bytes + (end - start) * row_bytes <= self.bytes and size <= MOST_EXPERTS
            if last < len(ends) and (size <= experts if experts else fits):
                continue
            end = ends[last - 1]
            if end > start:
                cuts = range(start, end, rows_at_once)
                yield Chunk(first, last, [slice(cut, min(cut + rows_at_once, end)) for cut in cuts])
            first, start = last, end
