"""Decoded experts and LoRA factors kept between forwards: generation needs the same ones at every token.

Native products (`finetune.model.native`) need no decoded experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from finetune.model.expert_layer import Factors
from finetune.model.experts import Experts

# Of the memory that is free when generation begins; the other half is for its cache and everyone else.
SHARE_OF_FREE_MEMORY = 0.5


class Kept:
    """What has been decoded, up to `room` bytes: then the rest is decoded at each use.

    Nothing is given up for something newer: layers take turns, so what was used longest ago is needed next.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._experts: dict[tuple[Any, ...], Tensor] = {}
        self._factors: dict[tuple[Any, ...], tuple[Factors, Factors]] = {}

    def find(self, *key: Any) -> Tensor | None:
        """The decoded expert of that key."""
        return self._experts.get(key)

    def offer(self, weights: Tensor, *key: Any) -> None:
        """Keep a copy of a decoded expert where there is room for it."""
        if weights.nbytes <= self.room:
            self.room -= weights.nbytes
            self._experts[key] = weights.clone()

    def ready(self, factors: Factors, dtype: torch.dtype) -> Factors:
        """`factors.ready(dtype)`, made once of a single adapter's."""
        if not factors.a._is_view():  # several adapters are joined anew at each forward
            return factors.ready(dtype)
        key = factors.a.data_ptr(), factors.b.data_ptr(), factors.scale, dtype
        if key not in self._factors:
            # With the factors themselves, so that no others can come to lie at their address.
            self._factors[key] = factors, factors.ready(dtype)
        return self._factors[key][1]


@contextmanager
def keep_decoded(model: nn.Module, room: int | None = None) -> Iterator[None]:
    """Until the block ends, experts that torch multiplies on the CPU are kept decoded, up to `room` bytes
    (half the free memory if not given), and LoRA factors as the products want them. Weights must not change
    meanwhile.
    """
    found = [module for module in model.modules() if isinstance(module, Experts)]
    on_cpu = [module for module in found if module.gate_up_proj.device.type == "cpu"]
    scratches = {id(module.scratch): module.scratch for module in on_cpu}
    outer = {key: scratch.kept for key, scratch in scratches.items()}
    free = int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)
    kept = Kept(free if room is None else room)
    for key, scratch in scratches.items():
        scratch.kept = outer[key] or kept
    try:
        yield
    finally:
        for key, scratch in scratches.items():
            scratch.kept = outer[key]
