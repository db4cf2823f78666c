"""Gradient checkpointing that never runs the experts twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssForCausalLM


class _NotWrapped:
    """Stops transformers from wrapping the forward of a subclass in a checkpoint of the whole layer."""

    def __init_subclass__(cls) -> None:
        pass


class SelectiveDecoderLayer(_NotWrapped, GptOssDecoderLayer):  # type: ignore[misc]  # untyped there
    """A decoder layer that recomputes its attention and router, and leaves the experts to their own function.

    transformers checkpoints a layer whole, so backward would decode and multiply every expert once more.
    The expert layer saves nothing but its input and recomputes what it needs by itself: only what
    surrounds it is checkpointed. Kept for backward: the layer's input, the stream between its halves, and
    the experts' input.
    """

    # Older transformers wrap here instead.
    __call__ = nn.Module.__call__

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`hidden_states [B, L, H]` -> `[B, L, H]`; keyword arguments as transformers passes them."""
        # With a cache, which attention writes, a second run would write twice.
        if self.gradient_checkpointing and self.training and kwargs.get("past_key_values") is None:
            recomputed = self._gradient_checkpointing_func
            hidden_states = recomputed(self._attend, hidden_states, kwargs)
            routed = recomputed(self._route, hidden_states)
        else:
            hidden_states = self._attend(hidden_states, kwargs)
            routed = self._route(hidden_states)
        mixed: Tensor = self.mlp.experts(*routed)
        return hidden_states + mixed.view_as(hidden_states)

    def _attend(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        attended: Tensor
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attended

    def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> experts' input `[T, H]`, indices `[T, k]`, scores `[T, k]`."""
        x = self.post_attention_layernorm(hidden_states).flatten(0, 1)
        _, scores, indices = self.mlp.router(x)
        return x, indices, scores


def use_selective_recompute(model: GptOssForCausalLM) -> None:
    """Make `gradient_checkpointing_enable` selective; without it nothing changes."""
    for layer in model.model.layers:
        layer.__class__ = SelectiveDecoderLayer
