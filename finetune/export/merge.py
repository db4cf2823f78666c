"""What an adapter changes, by the released names of the tensors: W becomes W + scale * B A."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from finetune.export.peft_files import Adapter
from finetune.model.expert_layer import Factors

# Where PEFT keeps the factors of a weight, and what it calls the weight when it looks for patterns.
DENSE = {
    **{f"self_attn.{name}_proj.weight": f"self_attn.{name}_proj" for name in "qkvo"},
    "mlp.router.weight": "mlp.router",
}
EXPERTS = {"mlp.experts.gate_up_proj": "mlp.experts.base_layer", "mlp.experts.down_proj": "mlp.experts"}


class Deltas:
    """The changes of a complete adapter (see `peft_files.complete`), made when asked for, in float32."""

    def __init__(self, adapter: Adapter, experts: int) -> None:
        self._adapter, self._experts = adapter, experts

    def dense(self, name: str) -> Tensor | None:
        """scale * B A `[out, in]` of a weight such as `model.layers.0.self_attn.q_proj.weight`."""
        found = self.dense_factors(name)
        return None if found is None else found.b @ found.a

    def dense_factors(self, name: str) -> Factors | None:
        """`a [r, in]` and `b [out, r]`, which holds the scale, of such a weight."""
        layer, part = _split(name)
        found = self._factors(layer, DENSE.get(part))
        if found is None:
            return None
        a, b = found
        # PEFT names a router, whose parameter it wraps, with `.weight` and a linear layer without.
        module = name if part == "mlp.router.weight" else name.removesuffix(".weight")
        return Factors(a, b * scale_of(self._adapter.config, module, a.shape[0]))

    def experts(self, name: str) -> Factors | None:
        """`a [E, r, in]` and `b [E, out, r]`, which holds the scale, of an expert parameter.

        `name` is such as `model.layers.0.mlp.experts.gate_up_proj`; the change of expert e is b[e] @ a[e].
        """
        layer, part = _split(name)
        found = self._factors(layer, EXPERTS.get(part))
        if found is None:
            return None
        a = found[0].view(self._experts, -1, found[0].shape[1])
        b = found[1].view(found[1].shape[0], -1, self._experts).permute(2, 0, 1)
        scale = scale_of(self._adapter.config, name, a.shape[1])
        return Factors(a.contiguous(), b.contiguous() * scale)

    def _factors(self, layer: str, place: str | None) -> tuple[Tensor, Tensor] | None:
        key = f"base_model.model.model.layers.{layer}.{place}.lora_{{}}.weight"
        tensors = self._adapter.tensors
        if key.format("A") not in tensors:
            return None
        return tensors[key.format("A")].float(), tensors[key.format("B")].float()


def _split(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.router.weight` -> `3`, `mlp.router.weight`; empty for what is in no layer."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return (match[1], match[2]) if match else ("", "")


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA; alpha patterns are matched as PEFT matches them."""
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = float(next(matching, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
