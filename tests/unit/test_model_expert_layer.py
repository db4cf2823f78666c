"""The expert layer against a loop in float64 that autograd differentiates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig

from finetune.model import cpu_native, expert_layer, mxfp4
from finetune.model import experts as experts_module
from finetune.model.experts import DenseExperts, Experts, PackedExperts, Scratch
from finetune.model.lora import EXPERT_PARAMETERS, with_our_wrapper
from finetune.model.native.products import native_products
from tests.model_kit import decode_by_definition, relative_error, without_native_products

EXPERTS, TOP, HIDDEN, INNER = 6, 3, 96, 160
ONE_EXPERT = 2 * INNER * HIDDEN
LORA_ALPHA = 20
# Roundings of float32 over sums of some hundred terms.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass
class Case:
    """Inputs of a layer: `x [T, H]`, `indices [T, k]`, `scores [T, k]` and the gradient of the output."""

    x: Tensor
    indices: Tensor
    scores: Tensor
    d_out: Tensor


def make_case(tokens: int = 24, *, among: int = EXPERTS, size: float = 1.0, seed: int = 0) -> Case:
    """A case in float64 whose tokens go to the first `among` experts."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, among, generator=random, dtype=torch.float64)
    scores, indices = logits.topk(TOP, dim=-1)
    x = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64) * size
    d_out = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64)
    return Case(x, indices, scores.softmax(-1), d_out)


class Layer(nn.Module):
    """A module with experts where PEFT looks for them."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"experts": experts})

    @property
    def base(self) -> Any:
        """The module that holds the frozen weights, under PEFT's wrappers if there are any."""
        return next(module for module in self.modules() if isinstance(module, Experts))

    def forward(self, x: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        out: Tensor = self.mlp["experts"](x, indices, scores)
        return out


def make_layer(dtype: torch.dtype, *, rank: int | None = 8, dense: bool = False, seed: int = 3) -> Layer:
    """Random experts with LoRA in PEFT's stock layout; the dense ones are the packed ones, decoded."""
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    random = torch.Generator().manual_seed(seed)
    packed = PackedExperts(config, Scratch())
    for name, parameter in packed.named_parameters():
        if name.endswith("_bias"):
            parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.3
        elif name.endswith("_scales"):  # weights of a few hundredths, as 1 / sqrt(HIDDEN)
            parameter.data = torch.randint(119, 123, parameter.shape, generator=random, dtype=torch.uint8)
        else:
            parameter.data = torch.randint(0, 256, parameter.shape, generator=random, dtype=torch.uint8)
    layer = Layer(_decoded(packed, config) if dense else packed).to(dtype).requires_grad_(False)
    if rank is not None:
        lora = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, target_parameters=EXPERT_PARAMETERS)
        inject_adapter_in_model(with_our_wrapper(lora), layer)
        for parameter in lora_weights(layer):
            values = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.05
            parameter.data = values.to(dtype)
    return layer


def _decoded(packed: PackedExperts, config: GptOssConfig) -> DenseExperts:
    dense = DenseExperts(config, Scratch())
    for name in ("gate_up_proj", "down_proj"):
        weights = decode_by_definition(packed.get_parameter(name), packed.get_parameter(f"{name}_scales"))
        dense.get_parameter(name).data = weights.transpose(1, 2).contiguous()
        dense.get_parameter(f"{name}_bias").data = packed.get_parameter(f"{name}_bias").data
    return dense


def lora_weights(layer: Layer) -> list[nn.Parameter]:
    """A and B of gate_up, then A and B of down."""
    named = {name: parameter for name, parameter in layer.named_parameters() if "lora_" in name}
    order = ("base_layer.lora_A", "base_layer.lora_B", "experts.lora_A", "experts.lora_B")
    return [parameter for part in order for name, parameter in named.items() if part in name]


def run(layer: Layer, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The output, then the gradients of x, of the scores and of LoRA's matrices."""
    x, scores = case.x.to(dtype).requires_grad_(), case.scores.to(dtype).requires_grad_()
    out = layer(x, case.indices, scores)
    grads = torch.autograd.grad(out, [x, scores, *lora_weights(layer)], case.d_out.to(dtype))
    return [out.detach(), *grads]


def reference(layer: Layer, case: Case) -> list[Tensor]:
    """The same by the definition, in float64: every expert on every token, weighted by its score or zero."""
    lora = [parameter.detach().double().requires_grad_() for parameter in lora_weights(layer)]
    x, scores = case.x.clone().requires_grad_(), case.scores.clone().requires_grad_()
    base = layer.base
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        up_weight = _weight(layer, "gate_up_proj", lora[:2], expert)
        down_weight = _weight(layer, "down_proj", lora[2:], expert)
        y = x @ up_weight.t() + base.gate_up_proj_bias[expert].double()
        gate, up = y[:, 0::2].clamp(max=base.limit), y[:, 1::2].clamp(-base.limit, base.limit)
        hidden = (up + 1) * gate * torch.sigmoid(base.alpha * gate)
        down = hidden @ down_weight.t() + base.down_proj_bias[expert].double()
        out = out + (scores * (case.indices == expert)).sum(1, keepdim=True) * down
    return [out.detach(), *torch.autograd.grad(out, [x, scores, *lora], case.d_out)]


def _weight(layer: Layer, name: str, lora: list[Tensor], expert: int) -> Tensor:
    """`[out, in]` of an expert with its LoRA, in PEFT's layout: rows of A by expert, columns of B by rank."""
    frozen: Tensor = decode_by_definition(
        layer.base.get_parameter(name)[expert], layer.base.get_parameter(f"{name}_scales")[expert]
    )
    if not lora:
        return frozen
    a, b = lora
    rank = a.shape[0] // EXPERTS
    return frozen + LORA_ALPHA / rank * b[:, expert::EXPERTS] @ a[expert * rank : (expert + 1) * rank]


NAMES = ("output", "x", "scores", "gate_up A", "gate_up B", "down A", "down B")


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < tolerance, dict(zip(NAMES, errors, strict=False))


# The experts of a group; 6 are not a multiple of 4.
WAYS = {
    "by-one": (torch.float32, 1), "by-four": (torch.float32, 4), "at-once": (torch.float32, 6),
    "float64": (torch.float64, 4), "native": (torch.float32, None), "native-by-one": (torch.float32, None),
}  # fmt: skip


@pytest.fixture(params=WAYS)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of the computation: by torch, with the experts taken one by one, in groups or all at once,
    or by native products."""
    dtype, group = WAYS[request.param]
    if group is not None:
        without_native_products(monkeypatch)
        monkeypatch.setattr(experts_module, "GROUP_WEIGHTS", group * ONE_EXPERT)
        assert make_layer(dtype, rank=None).base.group_size() == group
    elif native_products(dtype) is None:
        pytest.skip("no C compiler, or no AVX-512")
    elif request.param == "native-by-one":
        monkeypatch.setattr(cpu_native, "GROUP_VALUES", 1)
    return dtype


@pytest.mark.parametrize("rank", [3, 8, 12])
def test_outputs_and_all_gradients_are_the_references(dtype: torch.dtype, rank: int) -> None:
    layer, case = make_layer(dtype, rank=rank), make_case()
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


def test_the_layer_without_lora_is_the_references(dtype: torch.dtype) -> None:
    layer, case = make_layer(dtype, rank=None), make_case()
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


def test_where_the_limits_hold_outputs_and_gradients_are_the_references(dtype: torch.dtype) -> None:
    layer, case = make_layer(dtype), make_case(size=16.0)
    y = case.x @ _weight(layer, "gate_up_proj", [], 0).t()
    assert (y[:, 0::2] > 7).double().mean() > 0.1, "gates must be cut"
    assert (y[:, 1::2] > 7).double().mean() > 0.1 and (y[:, 1::2] < -7).double().mean() > 0.1
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


def test_experts_without_a_token_change_nothing_and_get_no_gradient(dtype: torch.dtype) -> None:
    layer, case = make_layer(dtype), make_case(among=3)
    found = run(layer, case, dtype)
    assert_close(found, reference(layer, case), TOLERANCE[dtype])
    up_a, up_b, down_a, down_b = found[3:]
    for a in (up_a, down_a):
        reached = a.view(EXPERTS, -1).any(1)
        assert reached.tolist() == [True] * 3 + [False] * 3
    for b in (up_b, down_b):
        reached = b.view(-1, EXPERTS).any(0)
        assert reached.tolist() == [True] * 3 + [False] * 3


def test_a_single_token_is_enough(dtype: torch.dtype) -> None:
    layer, case = make_layer(dtype), make_case(tokens=1)
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    layer, case = make_layer(dtype), make_case(tokens=100)
    first, second = run(layer, case, dtype), run(layer, case, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_other_layers_left_in_the_scratch_memory_does_not_matter() -> None:
    layer, other, case = make_layer(torch.float32), make_layer(torch.float32, seed=9), make_case()
    expected = run(layer, case, torch.float32)
    other.base.scratch = layer.base.scratch
    x = case.x.float().requires_grad_()
    out = layer(x, case.indices, case.scores.float())
    other(case.x.float(), case.indices, case.scores.float())  # between forward and backward
    (d_x,) = torch.autograd.grad(out, [x], case.d_out.float())
    assert torch.equal(d_x, expected[1])


def test_dense_experts_give_what_packed_ones_give(dtype: torch.dtype) -> None:
    case = make_case()
    dense, packed = make_layer(dtype, dense=True), make_layer(dtype)
    assert_close(run(dense, case, dtype), run(packed, case, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("group", [1, 4, 6, None])
def test_bfloat16_is_close_to_the_reference_and_repeats(
    group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if group is not None:
        without_native_products(monkeypatch)
        monkeypatch.setattr(experts_module, "GROUP_WEIGHTS", group * ONE_EXPERT)
    layer, case = make_layer(torch.bfloat16), make_case()
    x, scores, d_out = (t.bfloat16().double() for t in (case.x, case.scores, case.d_out))
    rounded = Case(x, case.indices, scores, d_out)
    # A bfloat16 is rounded by up to 2 ** -9; a result passes some five roundings, and sums of bfloat16 terms.
    found = run(layer, rounded, torch.bfloat16)
    assert_close(found, reference(layer, rounded), 10 * 2**-9)
    again = run(layer, rounded, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


class LargestNewMemory(TorchDispatchMode):
    """Notes the bytes of the largest memory that an operation took, views of older memory apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("way", ["packed", "dense", "native"])
def test_no_memory_of_a_weights_size_is_taken_once_the_scratch_is_there(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "native":
        without_native_products(monkeypatch)
    monkeypatch.setattr(experts_module, "GROUP_WEIGHTS", ONE_EXPERT)
    monkeypatch.setattr(mxfp4, "CHUNK_WEIGHTS", HIDDEN * 32)  # the decoder's indices
    monkeypatch.setattr(expert_layer, "RANK_MULTIPLE", 1)
    layer, case = make_layer(torch.float32, rank=2, dense=way == "dense"), make_case(tokens=4)
    run(layer, case, torch.float32)
    with LargestNewMemory() as largest:
        run(layer, case, torch.float32)
    assert largest.operations > 100
    one_experts_down_projection = 4 * INNER * HIDDEN
    assert largest.bytes < one_experts_down_projection / 2


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_frozen_weights_get_no_gradient(dense: bool) -> None:
    layer, case = make_layer(torch.float32, dense=dense), make_case()
    layer(case.x.float(), case.indices, case.scores.float()).backward(case.d_out.float())
    with_gradient = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert len(with_gradient) == 4 and all("lora_" in name for name in with_gradient)


def test_without_gradients_nothing_is_kept() -> None:
    layer, case = make_layer(torch.float32), make_case()
    with torch.no_grad():
        out = layer(case.x.float(), case.indices, case.scores.float())
    assert out.grad_fn is None
    assert relative_error(out, reference(layer, case)[0]) < TOLERANCE[torch.float32]


def test_experts_are_noted_only_while_watched_and_only_when_a_gradient_comes_to_them() -> None:
    layer, case = make_layer(torch.float32), make_case(tokens=2, among=4)
    case.d_out[1] = 0
    run(layer, case, torch.float32)
    layer.base.watch_gradients(True)
    run(layer, case, torch.float32)
    expected = sorted(set(case.indices[0].tolist()))
    assert layer.base.live_experts.nonzero().flatten().tolist() == expected
    layer.base.watch_gradients(False)
    run(layer, case, torch.float32)
    assert not layer.base.live_experts
