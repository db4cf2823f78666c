"""An adapter as PEFT stores it: read, checked against its base's sizes, completed, and measured.

Where the two expert parameters lie (E experts, rank r, hidden H, inner I; rows of lora_A are e*r + k, columns
of lora_B are k*E + e):

    ...mlp.experts.base_layer.lora_A  [E*r, H]     lora_B  [2I, r*E]      gate_up_proj
    ...mlp.experts.lora_A             [E*r, I]     lora_B  [H,  r*E]      down_proj

vLLM (lora/model_manager.py) asserts that both are there. PEFT writes an adapter of only one of the two
without the `base_layer` level, whichever it is.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.errors import FinetuneError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\."
    r"(?P<place>self_attn\.[qkvo]_proj|mlp\.router|mlp\.experts(?:\.base_layer)?)\.lora_(?P<half>[AB])\.weight"
)
# What vLLM refuses in an adapter (lora/peft_helper.py, 0.33), and PEFT cannot do on expert parameters.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "lora_bias": "LoRA biases",
    "trainable_token_indices": "trained embeddings",
    "layer_replication": "layer replication",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a gpt-oss that an adapter must fit."""

    layers: int
    experts: int
    hidden: int
    inner: int
    query: int
    key_value: int

    @classmethod
    def of(cls, base: Path) -> Sizes:
        """Read from a checkpoint's config.json.

        Raises:
            FinetuneError: it is not there or not a gpt-oss.
        """
        file = base / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                layers=config["num_hidden_layers"],
                experts=config["num_local_experts"],
                hidden=config["hidden_size"],
                inner=config["intermediate_size"],
                query=config["num_attention_heads"] * config["head_dim"],
                key_value=config["num_key_value_heads"] * config["head_dim"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise FinetuneError(f"this is not a gpt-oss checkpoint: {error!r}", at=str(file)) from error

    def in_out(self, place: str) -> tuple[int, int]:
        """Input and output width of the linear map at a place such as `self_attn.q_proj`."""
        return {
            "self_attn.q_proj": (self.hidden, self.query),
            "self_attn.k_proj": (self.hidden, self.key_value),
            "self_attn.v_proj": (self.hidden, self.key_value),
            "self_attn.o_proj": (self.query, self.hidden),
            "mlp.router": (self.hidden, self.experts),
            "mlp.experts.base_layer": (self.hidden, 2 * self.inner),
            "mlp.experts": (self.inner, self.hidden),
        }[place]


@dataclass(frozen=True)
class Adapter:
    """`config` is adapter_config.json; `tensors` are keyed as in adapter_model.safetensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Load an adapter directory.

        Raises:
            FinetuneError: a file is missing or cannot be read.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FinetuneError(f"there is no adapter here: {name} is missing", at=str(folder))
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            rank = config.get("r") if isinstance(config, dict) else None
            if type(rank) is not int or rank < 1:
                raise ValueError(f"{CONFIG} has no rank")
            return cls(config, load_file(folder / WEIGHTS))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise FinetuneError(f"this adapter cannot be read: {error}", at=str(folder)) from error

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def largest_rank(self) -> int:
        """Of all targets, some of which may have a rank of their own."""
        return int(max([self.rank, *(self.config.get("rank_pattern") or {}).values()]))

    @property
    def scale(self) -> float:
        """What B @ A is multiplied with where no pattern says otherwise."""
        by = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return float(self.config["lora_alpha"]) / by

    @property
    def learns_experts(self) -> bool:
        return any(".mlp.experts." in key for key in self.tensors)


def check(adapter: Adapter, sizes: Sizes, at: Path) -> None:
    """The adapter is a LoRA that stock PEFT and vLLM load, fits the base, and is whole.

    Raises:
        FinetuneError: the first thing that is wrong.
    """
    config = adapter.config
    if config.get("peft_type") != "LORA":
        raise FinetuneError(
            f"this adapter is {config.get('peft_type')}; only LORA can be exported", at=str(at)
        )
    refused = [words for key, words in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append("trained biases")
    if refused:
        raise FinetuneError(f"this adapter has {' and '.join(refused)}, which vLLM refuses", at=str(at))
    halves: dict[tuple[int, str], set[str]] = {}
    for key, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FinetuneError(f"this adapter holds {key}, which is not part of a gpt-oss LoRA", at=str(at))
        layer, place = int(match["layer"]), match["place"]
        halves.setdefault((layer, place), set()).add(match["half"])
        if layer >= sizes.layers:
            raise FinetuneError(f"{key} is beyond the base's {sizes.layers} layers", at=str(at))
        _check_shape(key, place, match["half"], tensor, adapter, sizes, at)
        if not tensor.isfinite().all():
            raise FinetuneError(f"{key} holds values that are not finite", at=str(at))
    _check_whole(adapter, halves, sizes.layers, at)


def _check_whole(adapter: Adapter, halves: dict[tuple[int, str], set[str]], layers: int, at: Path) -> None:
    """Both factors everywhere, in every layer; expert tensors exactly when the configuration names them."""
    for (layer, place), found in halves.items():
        if found != {"A", "B"}:
            raise FinetuneError(f"layer {layer} has only lora_{found.pop()} of {place}", at=str(at))
    for place in sorted({place for _, place in halves}):
        missing = [layer for layer in range(layers) if (layer, place) not in halves]
        if missing and adapter.config.get("layers_to_transform") is None:
            raise FinetuneError(f"layer {missing[0]} has no LoRA of {place}, and others have", at=str(at))
    named = any(name.endswith(("gate_up_proj", "down_proj")) for name in _targets(adapter))
    if named != adapter.learns_experts:
        what = "names expert parameters and holds none" if named else "holds expert parameters and names none"
        raise FinetuneError(f"this adapter {what}", at=str(at))


def _check_shape(
    key: str, place: str, half: str, tensor: Tensor, adapter: Adapter, sizes: Sizes, at: Path
) -> None:
    if place == "mlp.experts" and not _has_both(adapter):
        place = _lone_place(adapter)
    width_in, width_out = sizes.in_out(place)
    many = sizes.experts if place.startswith("mlp.experts") else 1
    fits = tensor.ndim == 2 and (
        tensor.shape[1] == width_in and tensor.shape[0] % many == 0
        if half == "A"
        else tensor.shape[0] == width_out and tensor.shape[1] % many == 0
    )
    ranks = {adapter.rank, *(adapter.config.get("rank_pattern") or {}).values()}
    if not fits or tensor.shape[0 if half == "A" else 1] // many not in ranks:
        raise FinetuneError(
            f"{key} has the shape {list(tensor.shape)}, which does not fit this base and rank {adapter.rank}",
            at=str(at),
        )


def _targets(adapter: Adapter) -> list[str]:
    return list(adapter.config.get("target_parameters") or [])


def _lone_place(adapter: Adapter) -> str:
    """Where the only trained expert parameter belongs once there are two."""
    return (
        "mlp.experts"
        if any(name.endswith("down_proj") for name in _targets(adapter))
        else "mlp.experts.base_layer"
    )


def _has_both(adapter: Adapter) -> bool:
    return any(".experts.base_layer." in key for key in adapter.tensors)


def complete(adapter: Adapter, sizes: Sizes) -> Adapter:
    """An adapter of one expert parameter with zeros for the other; any other adapter as it is."""
    if not adapter.learns_experts or _has_both(adapter):
        return adapter
    place = _lone_place(adapter)
    other = "mlp.experts" if place == "mlp.experts.base_layer" else "mlp.experts.base_layer"
    width_in, width_out = sizes.in_out(other)
    tensors = {}
    for key, tensor in adapter.tensors.items():
        tensors[key.replace("mlp.experts", place)] = tensor
        if ".mlp.experts.lora_A." in key:
            rows, dtype = tensor.shape[0], tensor.dtype
            zeros_at = key.replace("mlp.experts", other)
            tensors[zeros_at] = torch.zeros(rows, width_in, dtype=dtype)
            tensors[zeros_at.replace("lora_A", "lora_B")] = torch.zeros(width_out, rows, dtype=dtype)
    kept = [name for name in _targets(adapter) if not name.endswith(("gate_up_proj", "down_proj"))]
    return Adapter({**adapter.config, "target_parameters": [*kept, GATE_UP, DOWN]}, tensors)


def expert_deltas(adapter: Adapter, experts: int) -> Tensor:
    """Frobenius norm of the change of every expert: float64 [expert parameters of all layers, experts].

    From the r x r Gram matrices, |BA|^2 = tr(B'B AA'): the change itself would be as large as the model.
    """
    norms = []
    for key, a in adapter.tensors.items():
        if ".mlp.experts." in key and key.endswith("lora_A.weight"):
            b = adapter.tensors[key.replace("lora_A", "lora_B")]
            per_a = a.double().view(experts, -1, a.shape[1])
            per_b = b.double().view(b.shape[0], -1, experts).permute(2, 0, 1)
            grams = (per_b.mT @ per_b) * (per_a @ per_a.mT)
            norms.append(grams.sum((1, 2)).clamp(min=0).sqrt() * adapter.scale)
    return torch.stack(norms) if norms else torch.zeros(0, experts, dtype=torch.float64)
