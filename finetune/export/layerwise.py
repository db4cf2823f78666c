"""A checkpoint computed with one layer at a time in memory, on several versions of its weights in step.

Everything is computed in float32: what the versions differ by is small beside bf16's own noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
)

from finetune.export.tensors import DTYPES, Checkpoint
from finetune.model.attention import Packing
from finetune.model.cpu_settings import return_freed_memory
from finetune.model.expert_layer import Factors
from finetune.model.experts import PackedExperts, Scratch
from finetune.model.loading import read_model_config

# Rows of the output head in memory at once: 189 MB in float32 at the width of gpt-oss-20b.
HEAD_ROWS = 16384
# Tokens that pass the experts at once: all may go to the same ones, which then work in 0.3 GB of gpt-oss-20b.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Passage:
    """Packed examples, `[L]` each: tokens, the next one where it is learned (else -100), positions."""

    ids: Tensor
    targets: Tensor
    positions: Tensor


class Layer:
    """One decoder layer; its weights may be replaced between passes."""

    def __init__(self, module: GptOssDecoderLayer, rotary: GptOssRotaryEmbedding, window: int) -> None:
        self._module, self._rotary, self._window = module, rotary, window

    @property
    def experts(self) -> PackedExperts:
        found: PackedExperts = self._module.mlp.experts
        return found

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Put in weights (float32) by their names within the layer, such as `mlp.router.weight`."""
        for name, weight in weights.items():
            parameter = self._module.get_parameter(name)
            parameter.data = weight.to(parameter.device)

    def attend(self, state: Tensor, passage: Passage) -> Tensor:
        """`state [L, H]` past attention, `[L, H]`."""
        positions = passage.positions.unsqueeze(0)
        normed = self._module.input_layernorm(state).unsqueeze(0)
        out: Tensor = self._module.self_attn(
            hidden_states=normed,
            position_embeddings=self._rotary(normed, positions),
            attention_mask=Packing(positions, self._window),
        )[0]
        return state + out[0]

    def before_attention(self, state: Tensor) -> Tensor:
        """What query, key and value projections see of a `state [n, H]`."""
        out: Tensor = self._module.input_layernorm(state)
        return out

    def heads(self, state: Tensor, passage: Passage) -> Tensor:
        """What the output projection of attention sees, `[L, heads * head size]`."""
        seen: list[Tensor] = []
        projection = self._module.self_attn.o_proj
        hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.attend(state, passage)
        hook.remove()
        return seen[0][0]

    def past_attention(self, states: Sequence[Tensor], heads: Sequence[Tensor]) -> list[Tensor]:
        """What `attend` makes of each state, `[L, H]`, given what `heads` found."""
        projection = self._module.self_attn.o_proj
        return [state + projection(seen) for state, seen in zip(states, heads, strict=True)]

    def normed(self, state: Tensor) -> Tensor:
        """What router and experts see of a `state [n, H]` past attention."""
        out: Tensor = self._module.post_attention_layernorm(state)
        return out

    def route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and scores of each row, `[n, k]` both."""
        _, scores, indices = self._module.mlp.router(normed)
        return indices, scores

    def finish(self, state: Tensor, factors: Mapping[str, Factors]) -> Tensor:
        """`state [L, H]` past attention through the experts, `factors` added to their weights, `[L, H]`."""
        self.experts.active_factors.update(factors)
        parts = self.normed(state).split(TOKENS_AT_ONCE)
        out = torch.cat([self.experts(some, *self.route(some)) for some in parts])
        self.experts.active_factors.clear()
        return state + out


class Network:
    """The checkpoint in a directory, on `device`; its experts are MXFP4."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.checkpoint = Checkpoint(path)
        self.config = read_model_config(path, torch.float32)
        self.device = device
        self.dense_dtype = DTYPES[self.checkpoint.dtype("model.layers.0.self_attn.o_proj.weight")]
        self._rotary = GptOssRotaryEmbedding(config=self.config).to(device)
        self._scratch = Scratch()

    def layer(self, number: int) -> Layer:
        """Read a layer."""
        with torch.device("meta"):
            module = GptOssDecoderLayer(self.config, number)
            module.mlp.experts = PackedExperts(self.config, self._scratch)
        prefix, state = f"model.layers.{number}.", {}
        for name in self.checkpoint.info.tensors:
            if name.startswith(prefix):
                tensor = self.checkpoint.read(name)
                tensor = tensor if tensor.dtype == torch.uint8 else tensor.float()
                state[name.removeprefix(prefix).removesuffix("_blocks")] = tensor.to(self.device)
        module.load_state_dict(state, assign=True, strict=True)
        module.requires_grad_(False).eval()
        return Layer(module, self._rotary, self.config.sliding_window)

    def restore_experts(self, layer: Layer, number: int) -> None:
        """Give a layer's experts the checkpoint's bytes again."""
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{number}.mlp.experts.{part}"
            layer.experts.get_parameter(part).copy_(self.checkpoint.read(f"{name}_blocks"))
            layer.experts.get_parameter(f"{part}_scales").copy_(self.checkpoint.read(f"{name}_scales"))

    def release_scratch(self) -> None:
        """Give back what the experts' passes work in, which is as long as the rows of the busiest expert."""
        self._scratch.clear()
        return_freed_memory()

    def embed(self, passage: Passage) -> Tensor:
        """The first layer's input, `[L, H]`."""
        # A word used twice is read once, and of the rest of the vocabulary nothing.
        words, where = passage.ids.cpu().unique(return_inverse=True)
        name = "model.embed_tokens.weight"
        rows = torch.cat([self.checkpoint.read(name, word, word + 1) for word in words.tolist()])
        return rows.float()[where].to(self.device)

    def final_norm(self, state: Tensor) -> Tensor:
        norm = GptOssRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight.data = self.checkpoint.read("model.norm.weight").float()
        out: Tensor = norm.to(self.device).requires_grad_(False)(state)
        return out

    def head(self) -> Iterator[Tensor]:
        """The output head, `[rows, H]` at a time."""
        words = self.config.vocab_size
        for first in range(0, words, HEAD_ROWS):
            rows = self.checkpoint.read("lm_head.weight", first, min(first + HEAD_ROWS, words))
            yield rows.float().to(self.device)
