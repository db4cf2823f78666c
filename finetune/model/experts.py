"""The modules that hold a layer's experts: as released (packed MXFP4) or dense (a merged bf16 checkpoint)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig

from finetune.model.cpu import CpuProducts
from finetune.model.expert_layer import BackEnd, Factors, run_experts
from finetune.model.layout import BLOCK, BYTES_PER_BLOCK
from finetune.model.mxfp4 import dequantise_mxfp4

if TYPE_CHECKING:
    from finetune.model.kept import Kept
    from finetune.model.kernels.stream import ExpertStream

# Blocks, scales, and where the weights go.
Decoder = Callable[[Tensor, Tensor, Tensor], None]
Weights = dict[str, Tensor]

# Weights that a group of experts decodes at once on a CPU. Below it, small experts share the steps between
# the products instead of paying for a dozen small operations each. A larger expert (16.6 M in gpt-oss-20b's
# gate_up) is decoded in slices of half as many, which are still in the cache when they are multiplied.
GROUP_WEIGHTS = 1 << 22
ALL = slice(None)


class Scratch:
    """Memory for decoded weights, shared by a model's layers: one buffer a purpose, kept at its largest."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.back_ends: dict[tuple[torch.device, torch.dtype], BackEnd] = {}
        self.kept: Kept | None = None  # while `keep_decoded` lasts

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with whatever its last user left in it; valid until the next call for the same purpose."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get((purpose, dtype, device))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[purpose, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def clear(self) -> None:
        """Give the memory back; what was handed out stays with those who have it."""
        self._buffers.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()


def _back_end_for(device: torch.device, dtype: torch.dtype) -> BackEnd:
    if device.type == "cpu":
        return CpuProducts()
    from finetune.model.kernels.wide import Wide

    return Wide.on(device, dtype)


class Experts(nn.Module, ABC):
    """What packed and dense experts share: sizes, biases, the activation's constants, active LoRA factors.

    Takes the place of transformers' `GptOssExperts`, with its forward signature.
    """

    # PEFT reads this to know that lora_A meets the input and lora_B the output without swapping the two.
    is_transposed = True
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, config: GptOssConfig, scratch: Scratch) -> None:
        super().__init__()
        self.num_experts: int = config.num_local_experts
        self.hidden_size: int = config.hidden_size
        self.intermediate_size: int = config.intermediate_size
        # Constants in transformers before its configuration named them.
        self.alpha: float = getattr(config, "swiglu_alpha", 1.702)
        self.limit: float = getattr(config, "swiglu_limit", 7.0)
        self.scratch = scratch
        self.active_factors: dict[str, Factors] = {}
        self.live_experts: Tensor | None = None  # [E] bool while gradients are watched

    def _add_biases(self) -> None:
        # Registered after the weights: PEFT names adapters by the order of a module's parameters.
        self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))

    def features(self, parameter_name: str) -> tuple[int, int]:
        """In and out of `gate_up_proj` or `down_proj`, whatever the layout they are stored in."""
        if parameter_name == "gate_up_proj":
            return self.hidden_size, 2 * self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def group_size(self) -> int:
        """Experts to decode at once on a CPU."""
        per_expert = 2 * self.intermediate_size * self.hidden_size
        return min(self.num_experts, max(1, GROUP_WEIGHTS // per_expert))

    def features_at_once(self, parameter_name: str) -> int:
        """Output features of an expert to decode at once on a CPU; all, where they are kept."""
        inputs, outputs = self.features(parameter_name)
        return outputs if self.scratch.kept else min(outputs, max(1, GROUP_WEIGHTS // 2 // inputs))

    def watch_gradients(self, on: bool) -> None:
        """Begin or end noting which experts have a token that sends them a gradient."""
        device = self.gate_up_proj_bias.device
        self.live_experts = torch.zeros(self.num_experts, dtype=torch.bool, device=device) if on else None

    def note_gradient(self, expert: Tensor, d_rows: Tensor, score: Tensor) -> None:
        """`expert [n]` of each row, the gradient `d_rows [n, H]` that came to it, its weight `score [n]`."""
        if self.live_experts is not None:
            self.live_experts[expert[d_rows.any(1) & (score != 0)]] = True

    def back_end(self, x: Tensor) -> BackEnd:
        """What multiplies rows like `x`; kept with the scratch memory, which all layers share."""
        kept = self.scratch.back_ends
        if (x.device, x.dtype) not in kept:
            kept[x.device, x.dtype] = _back_end_for(x.device, x.dtype)
        return kept[x.device, x.dtype]

    def bias(self, parameter_name: str) -> Tensor:
        """`[E, out]` of `gate_up_proj` or `down_proj`."""
        return self.get_parameter(f"{parameter_name}_bias")

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """`hidden_states [T, H]`, `router_indices [T, k]`, `routing_weights [T, k]` -> `[T, H]`."""
        up, down = self.active_factors.get("gate_up_proj"), self.active_factors.get("down_proj")
        return run_experts(hidden_states, router_indices, routing_weights, self, up, down)

    @abstractmethod
    def weights(
        self, name: str, first: int, last: int, dtype: torch.dtype, features: slice = ALL
    ) -> Sequence[Tensor]:
        """Of each expert `gate_up_proj [2I, H]`, gate and up rows interleaved, or `down_proj [H, I]`; if
        `features` are given, those rows of it."""

    # Where the packed bytes stay in host memory.
    stream: ExpertStream | None = None

    def packed(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`blocks [E, out, in/32, 16]` and `scales [E, out, in/32]` of `gate_up_proj` or `down_proj`, where
        they are packed."""
        return None

    @abstractmethod
    def write_weights(self, first: int, last: int, outs: Weights, decode: Decoder, backward: bool) -> None:
        """Weights by name into the first columns of `outs[name] [last - first, out, W]`."""


class PackedExperts(Experts):
    """Experts in the released bytes, `blocks [E, out, in/32, 16]` and `scales [E, out, in/32]`."""

    def __init__(self, config: GptOssConfig, scratch: Scratch) -> None:
        super().__init__(config, scratch)
        for name in ("gate_up_proj", "down_proj"):
            inputs, outputs = self.features(name)
            shape = self.num_experts, outputs, inputs // BLOCK, BYTES_PER_BLOCK
            blocks = torch.empty(shape, dtype=torch.uint8)
            self.register_parameter(name, nn.Parameter(blocks, requires_grad=False))
        for name in ("gate_up_proj", "down_proj"):
            inputs, outputs = self.features(name)
            scales = torch.empty(self.num_experts, outputs, inputs // BLOCK, dtype=torch.uint8)
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))
        self._add_biases()

    def packed(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_parameter(name), self.get_parameter(f"{name}_scales")

    def keep_on_host(self, stream: ExpertStream) -> None:
        """Leave blocks and scales in host memory wherever the module moves, and bring them when needed."""
        from finetune.model.kernels.stream import pin

        self.stream = stream
        for parameter in self.parameters(recurse=False):
            if parameter.dtype == torch.uint8:
                parameter.data = pin(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        def move(x: Tensor) -> Tensor:
            return x if self.stream is not None and x.dtype == torch.uint8 else fn(x)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def write_weights(self, first: int, last: int, outs: Weights, decode: Decoder, backward: bool) -> None:
        packed = [
            self.get_parameter(f"{name}{part}")[first:last] for name in outs for part in ("", "_scales")
        ]
        if self.stream is not None:
            packed = self.stream.fetch((id(self), first, last, backward), packed)
        for out, blocks, scales in zip(outs.values(), packed[0::2], packed[1::2], strict=True):
            decode(blocks, scales, out)
        if self.stream is not None:
            self.stream.release()

    def weights(
        self, name: str, first: int, last: int, dtype: torch.dtype, features: slice = ALL
    ) -> Sequence[Tensor]:
        kept = self.scratch.kept
        if kept is None:
            return self._decode(name, first, last, dtype, features).unbind()
        found = []
        for expert in range(first, last):
            weights = kept.find(self, name, expert, dtype)
            if weights is None:
                weights = self._decode(name, expert, expert + 1, dtype)[0]
                # The next expert is decoded to the same scratch memory.
                weights = weights if last == first + 1 else weights.clone()
                kept.offer(weights, self, name, expert, dtype)
            found.append(weights)
        return found

    def _decode(self, name: str, first: int, last: int, dtype: torch.dtype, features: slice = ALL) -> Tensor:
        blocks = self.get_parameter(name)[first:last, features]
        scales = self.get_parameter(f"{name}_scales")[first:last, features]
        shape = *scales.shape[:2], self.features(name)[0]
        out = self.scratch.take(name, shape, dtype, blocks.device)
        return dequantise_mxfp4(blocks, scales, dtype, out=out)


class DenseExperts(Experts):
    """Experts of a merged bf16 checkpoint, laid out `gate_up_proj [E, H, 2I]` and `down_proj [E, I, H]`."""

    def __init__(self, config: GptOssConfig, scratch: Scratch) -> None:
        super().__init__(config, scratch)
        for name in ("gate_up_proj", "down_proj"):
            inputs, outputs = self.features(name)
            weights = torch.empty(self.num_experts, inputs, outputs)
            self.register_parameter(name, nn.Parameter(weights, requires_grad=False))
        self._add_biases()

    def weights(
        self, name: str, first: int, last: int, dtype: torch.dtype, features: slice = ALL
    ) -> Sequence[Tensor]:
        return self.get_parameter(name)[first:last, :, features].to(dtype).transpose(1, 2).unbind()

    def write_weights(self, first: int, last: int, outs: Weights, decode: Decoder, backward: bool) -> None:
        for name, out in outs.items():
            weights = self.get_parameter(name)[first:last].transpose(1, 2)
            out[..., : weights.shape[2]] = weights
