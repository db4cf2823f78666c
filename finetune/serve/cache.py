"""Keys and values of running sequences: pages of one bounded pool, and a ring for each windowed layer.

A layer with full attention keeps every token of a sequence, in pages of PAGE_TOKENS that are handed out as
the sequence grows (Kwon et al. 2023, "PagedAttention"). A windowed layer keeps the last `window` tokens: one
page of that size a sequence, written round and round. Both are the same tensor, `[pages * Hk * S, D]` with S
tokens a page, so one row holds one head's key of one token, and S rows together one head's part of a page.

Letters in shapes: Hk key heads, D head size, S tokens a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GptOssConfig

from finetune.errors import FinetuneError

# Small enough that half a page wasted a sequence is nothing, large enough that reading is whole cache lines.
PAGE_TOKENS = 32
# What of the free memory the cache may take. The CPU's is shared with all that runs on the machine; a GPU's
# rest is for a step's own tensors.
SHARE_OF_FREE = {"cpu": 0.25, "cuda": 0.8}


@dataclass(frozen=True)
class CacheSize:
    """`pages` for layers with full attention, and `sequences` that can run at once, each with its windows."""

    pages: int
    sequences: int
    bytes: int

    @property
    def tokens(self) -> int:
        """The longest sequence that fits while it runs alone."""
        return self.pages * PAGE_TOKENS


def plan_cache(
    config: GptOssConfig, *, context: int, sequences: int, free: float, itemsize: int
) -> CacheSize:
    """As many pages as `sequences` of `context` tokens need, if `free` bytes hold them, else as fit.

    Raises:
        FinetuneError: not even one page a sequence fits.
    """
    row = 2 * config.num_key_value_heads * config.head_dim * itemsize  # a token's key and value in one layer
    windowed = sum(kind == "sliding_attention" for kind in config.layer_types)
    full = config.num_hidden_layers - windowed
    rings = sequences * windowed * config.sliding_window * row
    page = full * PAGE_TOKENS * row
    wanted = sequences * math.ceil(context / PAGE_TOKENS)
    pages = wanted if not page else min(wanted, int((free - rings) // page))
    if pages < sequences:
        raise FinetuneError(
            f"{free / 1e9:.2f} GB hold no cache for {sequences} requests at once; "
            "use a smaller --batch or a larger --cache-gb"
        )
    return CacheSize(pages, sequences, rings + pages * page)


def free_bytes(device: torch.device) -> float:
    """What the cache may take of the memory that is free now."""
    if device.type == "cuda":
        return SHARE_OF_FREE["cuda"] * torch.cuda.mem_get_info(device)[0]
    import psutil

    return SHARE_OF_FREE["cpu"] * float(psutil.virtual_memory().available)


class KeyValueCache:
    """The tensors; `keys` and `values` by layer."""

    def __init__(
        self, config: GptOssConfig, size: CacheSize, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.size = size
        self.heads: int = config.num_key_value_heads
        self.window: int = config.sliding_window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for kind in config.layer_types:
            tokens = size.sequences * self.window if kind == "sliding_attention" else size.tokens
            shape = tokens * self.heads, config.head_dim
            # Zeros: what was never written is masked, and a masked NaN would still be a NaN.
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))


class Pages:
    """Which pages are free."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def take(self, number: int) -> list[int] | None:
        """So many pages, or None where there are not that many."""
        if number > len(self._free):
            return None
        return [self._free.pop() for _ in range(number)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
