"""LoRA on attention, on every expert and on the router, in PEFT's stock layout (`target_parameters`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from finetune.errors import FinetuneError
from finetune.model.checkpoint import fingerprint
from finetune.model.expert_layer import Factors
from finetune.model.experts import DenseExperts, Experts, PackedExperts
from finetune.model.places import ADAPTER_FILE, BASE_RECORD
from finetune.model.shrink import known_as_quantised

logger = logging.getLogger(__name__)

ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER_PARAMETERS = ["mlp.router.weight"]


class ExpertsLora(ParamWrapper):  # type: ignore[misc]  # PEFT has no types
    """PEFT's wrapper of one expert parameter; hands its factors to the expert layer, never makes W + BA."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts: Experts = self.get_base_layer()
        self.num_experts = experts.num_experts
        self._param_ndim = 3
        return experts.features(self.parameter_name)

    def factors(self, adapters: Sequence[str]) -> Factors:
        """The active adapters' factors, `a [E, R, in]`, `b [E, out, R]`: views of one, or several joined."""
        a = [self.lora_A[name].weight.view(self.num_experts, -1, self.in_features) for name in adapters]
        b = [
            self.lora_B[name].weight.view(self.out_features, -1, self.num_experts).permute(2, 0, 1)
            for name in adapters
        ]
        scales = [self.scaling[name] for name in adapters]
        if len(adapters) == 1:
            return Factors(a[0], b[0], scales[0])
        scaled = [factor * scale for factor, scale in zip(b, scales, strict=True)]
        return Factors(torch.cat(a, dim=1), torch.cat(scaled, dim=2))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        active: dict[str, Factors] = self.get_base_layer().active_factors
        if adapters:
            active[self.parameter_name] = self.factors(adapters)
        try:
            yield
        finally:
            active.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise FinetuneError(
            "packed experts cannot take an adapter in; export a merged model with `finetune export`"
        )


# PEFT tells a wrapper of parameters by this name when it nests one for each parameter of a module.
ExpertsLora.__name__ = ExpertsLora.__qualname__ = "ParamWrapper"


def with_our_wrapper(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({PackedExperts: ExpertsLora, DenseExperts: ExpertsLora})
    return config


def add_lora(
    model: GptOssForCausalLM, *, rank: int, alpha: float, targets: Sequence[str], rslora: bool = False
) -> PeftModel:
    """Put a new float32 adapter on `attention`, `experts`, `router` or several of them."""
    parameters = [
        *(EXPERT_PARAMETERS if "experts" in targets else []),
        *(ROUTER_PARAMETERS if "router" in targets else []),
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # annotated int, but PEFT only ever multiplies with it
        target_modules=ATTENTION_MODULES if "attention" in targets else [],
        target_parameters=parameters or None,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    with known_as_quantised(model):
        adapted = get_peft_model(model, with_our_wrapper(config))
    _settle(adapted)
    return adapted


def _settle(adapted: PeftModel) -> None:
    """What is trained is float32, and on the device that computes even where the experts are on the host."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for _, wrapper in expert_wrappers(adapted):
        device = wrapper.get_base_layer().gate_up_proj_bias.device
        wrapper.lora_A.to(device)
        wrapper.lora_B.to(device)


def save_adapter(model: PeftModel, path: Path, *, base: Path, where: str | None = None) -> None:
    """Write PEFT's files and the record of the base: `where` the user found it, its weights' fingerprint."""
    model.peft_config["default"].base_model_name_or_path = where or str(base)
    model.save_pretrained(str(path), save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)  # PEFT's placeholder; the export writes a model card
    record = {"where": where or str(base), "fingerprint": fingerprint(base)}
    (path / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def load_adapter(model: GptOssForCausalLM, path: Path, *, base: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the model.

    Raises FinetuneError when the adapter is unreadable, does not fit, or was trained on other weights than
    `base`; an adapter without a record of its base (any stock PEFT one) loads with a warning.
    """
    if not (path / ADAPTER_FILE).is_file():
        raise FinetuneError(f"no adapter here ({ADAPTER_FILE} is missing)", at=str(path))
    _check_base(path, base)
    config = _read_config(path)
    config.inference_mode = not trainable
    try:
        with known_as_quantised(model):
            adapted = PeftModelForCausalLM(model, with_our_wrapper(config))
        loaded = adapted.load_adapter(str(path), "default", is_trainable=trainable)
    except Exception as error:  # PEFT raises whatever its code meets in a configuration it does not expect
        lines = (str(error).strip() or type(error).__name__).splitlines()
        # torch lists what does not fit below a heading.
        reason = lines[1].strip() if lines[0].endswith(":") and len(lines) > 1 else lines[0]
        raise FinetuneError(f"the adapter does not load on this base ({reason})", at=str(path)) from None
    # PEFT would go on with fresh weights for the missing ones, and without those it has no place for.
    if loaded.missing_keys:
        sentence = f"the adapter's file lacks '{loaded.missing_keys[0]}', which its configuration asks for"
        raise FinetuneError(sentence, at=str(path))
    if loaded.unexpected_keys:
        sentence = f"the adapter's file has '{loaded.unexpected_keys[0]}', which has no place on this base"
        raise FinetuneError(sentence, at=str(path))
    _settle(adapted)
    return adapted


def _read_config(adapter: Path) -> LoraConfig:
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise FinetuneError(f"no adapter here ({file.name} is missing)", at=str(adapter))
    try:
        config = LoraConfig.from_pretrained(str(adapter))
    except Exception as error:  # PEFT raises whatever its code meets in a value it does not expect
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FinetuneError(f"not a readable LoRA configuration ({reason})", at=str(file)) from None
    if not isinstance(config, LoraConfig):
        raise FinetuneError("this is an adapter of another kind than LoRA", at=str(file))
    return config


def _check_base(adapter: Path, base: Path) -> None:
    record = adapter / BASE_RECORD
    if not record.is_file():
        logger.warning(
            "%s does not say which weights it was trained on; make sure that %s is its base", adapter, base
        )
        return
    try:
        trained_on = json.loads(record.read_text())
        expected, name = trained_on["fingerprint"], trained_on["where"]
    except (ValueError, KeyError, TypeError):
        raise FinetuneError("the record of the adapter's base is not readable", at=str(record)) from None
    if expected != fingerprint(base):
        sentence = f"this adapter was trained on other weights ('{name}') than those in {base}"
        raise FinetuneError(sentence, at=str(adapter))


def expert_wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and wrapper of every adapted expert parameter."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLora) and isinstance(module.get_base_layer(), Experts):
            yield name, module


class CoverageCheck:
    """Proof from the run itself that the adapter learns everywhere it should.

    Every expert to which a token sent a gradient must have a non-zero gradient in `lora_B` at the first
    optimiser step and in `lora_A` at the second. There an expert that the first step did not reach is let
    off: its `lora_B` is still zero, which makes the gradient of its `lora_A` zero.
    """

    LAST_STEP = 2

    def __init__(self, model: nn.Module) -> None:
        self._wrappers = list(expert_wrappers(model))
        self._dense = [
            (name, p) for name, p in model.named_parameters() if p.requires_grad and ".experts." not in name
        ]
        for experts in self._experts():
            experts.watch_gradients(True)

    def _experts(self) -> list[Experts]:
        return list(
            {id(experts := wrapper.get_base_layer()): experts for _, wrapper in self._wrappers}.values()
        )

    def check(self, step: int) -> dict[str, int]:
        """Call after the backward of optimiser step `step` (1 or 2), before the gradients are cleared.

        Returns how many experts there are and how many a gradient reached; raises FinetuneError on a gap.
        """
        factor = "lora_B" if step == 1 else "lora_A"
        reached = 0
        for name, wrapper in self._wrappers:
            live = wrapper.get_base_layer().live_experts
            reached += int(live.sum())
            silent = live & ~_experts_with(wrapper, factor, "grad")
            if factor == "lora_A":
                silent &= _experts_with(wrapper, "lora_B", "data")
            if silent.any():
                first = int(silent.nonzero()[0])
                sentence = f"{factor} of expert {first} in {name} has no gradient at step {step}"
                reason = "although tokens reached it: the adapter would not learn there, so the run stops"
                raise FinetuneError(f"{sentence} {reason}")
        for name, parameter in self._dense:
            if factor in name and (parameter.grad is None or not parameter.grad.any()):
                raise FinetuneError(f"{name} has no gradient at step {step}, so the run stops")
        for experts in self._experts():
            experts.watch_gradients(step < self.LAST_STEP)
        return {"experts": sum(wrapper.num_experts for _, wrapper in self._wrappers), "reached": reached}


def _experts_with(wrapper: Any, factor: str, what: Literal["data", "grad"]) -> Tensor:
    """`[E]` bool: whether any entry of an expert's factor, or of its gradient, is not zero."""
    weight = getattr(wrapper, factor)["default"].weight
    values: Tensor | None = getattr(weight, what)
    if values is None:
        return torch.zeros(wrapper.num_experts, dtype=torch.bool, device=weight.device)
    if factor == "lora_A":  # [E * r, in], expert slowest
        return values.view(wrapper.num_experts, -1).any(1)
    return values.view(-1, wrapper.num_experts).any(0)  # [out, r * E], expert fastest
