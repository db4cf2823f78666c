"""Keys and values of a generation, in memory that grows in steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, GptOssConfig
from transformers.cache_utils import DynamicLayer

# Tokens of room that a full layer takes at a time: it copies what it has once in so many tokens, where
# transformers' own layer does at each.
ROOM = 256


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A layer that attends to all earlier tokens; `keys` and `values` are the filled part of its memory."""

    _memory: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add `[B, Hk, t, D]` of new tokens; returns all there are, `[B, Hk, L, D]`."""
        filled: int = self.get_seq_length()
        end = filled + key_states.shape[2]
        if not filled or end > self._memory[0].shape[2]:
            self._grow(end + ROOM, filled, key_states)
        self._memory[0][:, :, filled:end] = key_states
        self._memory[1][:, :, filled:end] = value_states
        self.keys: Tensor = self._memory[0][:, :, :end]
        self.values: Tensor = self._memory[1][:, :, :end]
        self.is_initialized = True
        return self.keys, self.values

    def _grow(self, room: int, filled: int, like: Tensor) -> None:
        shape = *like.shape[:2], room, like.shape[3]
        memory = like.new_empty(shape), like.new_empty(shape)
        if filled:
            memory[0][:, :, :filled] = self.keys
            memory[1][:, :, :filled] = self.values
        self._memory = memory


class GrowingCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """For one `generate`; windowed layers keep a window, as transformers' own do."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = [layer if layer.is_sliding else _GrowingLayer() for layer in self.layers]
