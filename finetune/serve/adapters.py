"""Several adapters over one model in memory, one of them in effect at a time.

PEFT loads and checks each adapter; what it made of the factors is kept, and its wrappers are taken off again.
To switch is then to point each layer at other factors: nothing is built anew at a step, and the base costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from finetune.model import load_adapter
from finetune.model.experts import Experts
from finetune.model.lora import ExpertsLora

# Puts one place's share of an adapter in effect.
Setter = Callable[[], None]


class SwitchedLinear(nn.Module):
    """A linear map and, while an adapter is on, its factors `a [R, in]` and `b [out, R]`, scale in b."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.factors: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` -> `[..., out]`."""
        out: Tensor = self.base(x)
        if self.factors is None:
            return out
        a, b = self.factors
        return out + (x @ a.t()) @ b.t()


class Adapters:
    """The adapters of a model by name; None names the base."""

    def __init__(self, model: GptOssForCausalLM, folders: Mapping[str, Path], *, base: Path) -> None:
        """Load the adapters in `folders` over `model`, whose files are in `base`.

        Raises:
            FinetuneError: one is unreadable, does not fit, or was trained on other weights.
        """
        self._model = model
        self._bare = {
            name: parameter.data for name, parameter in model.named_parameters() if "router" in name
        }
        self._shares: dict[str | None, dict[str, Any]] = {None: {}}
        for name, folder in folders.items():
            adapted = load_adapter(model, folder, base=base)
            with torch.no_grad():
                self._shares[name] = _shares(adapted.base_model.model)
            adapted.unload()
        touched = {place for shares in self._shares.values() for place in shares}
        for place in sorted(touched):
            module = model.get_submodule(place)
            if isinstance(module, nn.Linear):
                model.set_submodule(place, SwitchedLinear(module))
        self._places = {place: model.get_submodule(place) for place in touched}
        self._current: str | None = None

    def switch(self, name: str | None) -> None:
        """Put one adapter in effect, or none."""
        if name == self._current:
            return
        shares = self._shares[name]
        for place, module in self._places.items():
            share = shares.get(place)
            if isinstance(module, SwitchedLinear):
                module.factors = share
            elif isinstance(module, Experts):
                module.active_factors = share or {}
            else:
                module.weight.data = self._bare[f"{place}.weight"] if share is None else share
        self._current = name


def _shares(model: nn.Module) -> dict[str, Any]:
    """What an adapter changes, by the place of the module in the bare model.

    For linear maps their factors, for experts the factors of both projections, for routers the changed
    weight.
    """
    shares: dict[str, Any] = {}
    for place, module in model.named_modules():
        if isinstance(module, ExpertsLora) and isinstance(module.get_base_layer(), Experts):
            # Wrapped once for each projection, one inside the other.
            outer = place.removesuffix(".base_layer")
            shares.setdefault(outer, {})[module.parameter_name] = module.factors(["default"])
        elif isinstance(module, ParamWrapper):
            weight = module.get_param()
            shares[place] = weight + module.get_delta_weight("default").to(weight.dtype)
        elif isinstance(module, LoraLayer):
            dtype = module.get_base_layer().weight.dtype
            b = module.lora_B["default"].weight * module.scaling["default"]
            shares[place] = module.lora_A["default"].weight.to(dtype), b.to(dtype)
    return shares
