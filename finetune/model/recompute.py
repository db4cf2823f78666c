"""Gradient checkpointing that never runs the experts twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssForCausalLM,
    apply_rotary_pos_emb,
)

from finetune.model.attention import Packing, begin, finish


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
    # Keep what attention took long for, too, and make its queries, keys and values anew.
    keep_attention = False

    # Older transformers wrap here instead.
    __call__ = nn.Module.__call__

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`hidden_states [B, L, H]` -> `[B, L, H]`; keyword arguments as transformers passes them."""
        # With a cache, which attention writes, a second run would write twice.
        if self.gradient_checkpointing and self.training and kwargs.get("past_key_values") is None:
            recomputed = self._gradient_checkpointing_func
            if self.keep_attention and isinstance(kwargs["attention_mask"], Packing):
                hidden_states = self._attend_and_keep(hidden_states, kwargs)
            else:
                hidden_states = recomputed(self._attend, hidden_states, kwargs)
            routed = recomputed(self._route, hidden_states)
            stream = hidden_states.detach()
            with self._made_anew(routed[:1], lambda: self._normalise(stream)):
                mixed = self.mlp.experts(*routed)
        else:
            hidden_states = self._attend(hidden_states, kwargs)
            mixed = self.mlp.experts(*self._route(hidden_states))
        added: Tensor = hidden_states + mixed.view_as(hidden_states)
        return added

    def _made_anew(
        self, tensors: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]]
    ) -> AbstractContextManager[Any]:
        """Keep none of `tensors` for the backward of what runs here: `make` makes them again."""
        if not self.renormalise:
            return nullcontext()
        places = {(tensor.data_ptr(), tensor.shape): number for number, tensor in enumerate(tensors)}
        made: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor | int:
            return places.get((tensor.data_ptr(), tensor.shape), tensor)

        def unpack(kept: Tensor | int) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            if kept not in made:
                with torch.no_grad():
                    made.update(enumerate(make()))
            return made.pop(kept)

        return saved_tensors_hooks(pack, unpack)

    def _attend_and_keep(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        recomputed, attention = self._gradient_checkpointing_func, self.self_attn
        turns, stream = kwargs["position_embeddings"], hidden_states.detach()
        query, key, value = recomputed(self._project, hidden_states, turns)
        with self._made_anew((query, key, value), lambda: self._project(stream, turns)):
            begun = begin(
                query, key, value, attention.sinks, kwargs["attention_mask"], attention.sliding_window,
                attention.scaling,
            )  # fmt: skip
        finished: Tensor = recomputed(self._finish, hidden_states, *begun)
        return finished

    def _project(self, hidden_states: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> queries `[B, Hq, L, D]`, keys and values `[B, Hk, L, D]`; `turns` are the cosines and sines."""
        x, attention = self.input_layernorm(hidden_states), self.self_attn
        query, key, value = (
            project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *turns)
        return query, key, value

    def _finish(self, hidden_states: Tensor, *begun: Tensor) -> Tensor:
        attended = finish(begun, self.self_attn.sinks).transpose(1, 2).flatten(2)
        out: Tensor = hidden_states + self.self_attn.o_proj(attended)
        return out

    def _attend(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        attended: Tensor
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attended

    def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> experts' input `[T, H]`, indices `[T, k]`, scores `[T, k]`."""
        (x,) = self._normalise(hidden_states)
        _, scores, indices = self.mlp.router(x)
        return x, indices, scores

    def _normalise(self, stream: Tensor) -> tuple[Tensor]:
        return (self.post_attention_layernorm(stream).flatten(0, 1),)


def keep_attention(model: nn.Module, layers: int) -> None:
    """Have the last `layers` of those that attend to all earlier tokens keep attention's result.

    Windowed layers recompute theirs cheaply; of the others the last give back first what they keep.
    """
    found = [module for module in model.modules() if isinstance(module, SelectiveDecoderLayer)]
    full = [layer for layer in found if layer.self_attn.sliding_window is None]
    for layer in full[len(full) - min(layers, len(full)) :]:
        layer.keep_attention = True


def keep_all_inputs(model: nn.Module) -> None:
    """For activations that are offloaded to the host."""
    for module in model.modules():
        if isinstance(module, SelectiveDecoderLayer):
            module.renormalise = False


def use_selective_recompute(model: GptOssForCausalLM) -> None:
    """Make `gradient_checkpointing_enable` selective; without it nothing changes."""
    for layer in model.model.layers:
        layer.__class__ = SelectiveDecoderLayer
