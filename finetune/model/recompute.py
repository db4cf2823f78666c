"""Gradient checkpointing that never runs the experts twice."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssForCausalLM


class _NotWrapped:
    """Stops transformers from wrapping the forward of a subclass in a checkpoint of the whole layer."""

    def __init_subclass__(cls) -> None:
        pass


class SelectiveDecoderLayer(_NotWrapped, GptOssDecoderLayer):  # type: ignore[misc]  # untyped there
    """A decoder layer that recomputes its attention and router, and leaves the experts to their own function.

    transformers checkpoints a layer whole, so backward would decode and multiply every expert once more.
    The expert layer saves nothing but its input and recomputes what it needs by itself: only what
    surrounds it is checkpointed. Kept for backward: the layer's input, and the stream between its halves,
    of which the experts' input is made anew.
    """

    # Where what is kept goes to the host, the experts' input goes there, too: the stream that it would be
    # made of could not leave the GPU before.
    renormalise = True

    # Older transformers wrap here instead.
    __call__ = nn.Module.__call__

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`hidden_states [B, L, H]` -> `[B, L, H]`; keyword arguments as transformers passes them."""
        # With a cache, which attention writes, a second run would write twice.
        if self.gradient_checkpointing and self.training and kwargs.get("past_key_values") is None:
            recomputed = self._gradient_checkpointing_func
            hidden_states = recomputed(self._attend, hidden_states, kwargs)
            routed = recomputed(self._route, hidden_states)
            with self._kept_as_stream(routed[0], hidden_states) if self.renormalise else nullcontext():
                mixed = self.mlp.experts(*routed)
        else:
            hidden_states = self._attend(hidden_states, kwargs)
            mixed = self.mlp.experts(*self._route(hidden_states))
        added: Tensor = hidden_states + mixed.view_as(hidden_states)
        return added

    def _kept_as_stream(self, x: Tensor, stream: Tensor) -> saved_tensors_hooks:
        """While experts run on `x [T, H]`, keep instead of it the `stream [B, L, H]` that it was made of."""
        stream, place, shape = stream.detach(), x.data_ptr(), x.shape

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor.data_ptr() == place and tensor.shape == shape else tensor

        def unpack(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            with torch.no_grad():
                again: Tensor = self.post_attention_layernorm(stream)
            return again.flatten(0, 1)

        return saved_tensors_hooks(pack, unpack)

    def _attend(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        attended: Tensor
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attended

    def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> experts' input `[T, H]`, indices `[T, k]`, scores `[T, k]`."""
        x = self.post_attention_layernorm(hidden_states).flatten(0, 1)
        _, scores, indices = self.mlp.router(x)
        return x, indices, scores


def keep_all_inputs(model: nn.Module) -> None:
    """For activations that are offloaded to the host."""
    for module in model.modules():
        if isinstance(module, SelectiveDecoderLayer):
            module.renormalise = False


def use_selective_recompute(model: GptOssForCausalLM) -> None:
    """Make `gradient_checkpointing_enable` selective; without it nothing changes."""
    for layer in model.model.layers:
        layer.__class__ = SelectiveDecoderLayer
