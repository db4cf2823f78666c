"""Gradient checkpointing changes what is kept, not what is learned, and never runs the experts twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.model import add_lora, attention
from finetune.model import experts as experts_module
from finetune.model.experts import PackedExperts
from finetune.model.mxfp4 import dequantise_mxfp4
from finetune.model.native.products import NativeProducts, native_products
from finetune.model.recompute import keep_all_inputs, keep_attention
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import our_model, random_ids, relative_error, without_native_products

LAYERS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base", layers=LAYERS)


def model_in_training(base: Path, dtype: torch.dtype, checkpointing: dict[str, Any] | None) -> Any:
    torch.manual_seed(0)
    targets = ["attention", "experts", "router"]
    model = add_lora(our_model(base, dtype), rank=4, alpha=8, targets=targets).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    return model


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of two packed documents."""
    ids = random_ids(1, 60)
    where = torch.cat([torch.arange(25), torch.arange(35)]).unsqueeze(0)
    loss = model(ids, position_ids=where, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kept_attentions", [0, 1, LAYERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_loss_and_gradients_are_those_without_checkpointing(
    base: Path, dtype: torch.dtype, reentrant: bool, kept_attentions: int
) -> None:
    plain_loss, plain = loss_and_gradients(model_in_training(base, dtype, None))
    model = model_in_training(base, dtype, {"use_reentrant": reentrant})
    keep_attention(model, kept_attentions)
    loss, gradients = loss_and_gradients(model)
    assert loss == plain_loss
    assert gradients.keys() == plain.keys() and len(plain) == LAYERS * (8 + 4 + 2)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        # The same operations on the same numbers, but sums of gradients may be taken in another order.
        assert relative_error(gradient, plain[name]) < (1e-6 if dtype == torch.float32 else 2**-8), name


def test_the_router_loss_reaches_the_router_through_checkpointing(base: Path) -> None:
    ids, gradients = random_ids(1, 60), []
    for checkpointing in (None, {"use_reentrant": False}):
        model = model_in_training(base, torch.float32, checkpointing)
        model(ids, labels=ids, use_cache=False, output_router_logits=True).aux_loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "router.lora_" in n})
    plain, found = gradients
    assert len(found) == LAYERS * 2 and all(gradient.any() for gradient in plain.values())
    assert all(relative_error(gradient, plain[name]) < 1e-6 for name, gradient in found.items())


CHECKPOINTING = pytest.mark.parametrize(
    "checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str
)


@CHECKPOINTING
def test_experts_are_decoded_exactly_twice_a_step(
    base: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: dict[str, Any] | None
) -> None:
    without_native_products(monkeypatch)
    model = model_in_training(base, torch.float32, checkpointing)
    decoded: list[Tensor] = []

    def count(blocks: Tensor, *arguments: Any, **named: Any) -> Tensor:
        decoded.append(blocks)
        return dequantise_mxfp4(blocks, *arguments, **named)

    monkeypatch.setattr(experts_module, "dequantise_mxfp4", count)
    loss_and_gradients(model)
    each = {blocks.data_ptr() for blocks in decoded}
    assert len(each) == LAYERS * 2  # all experts of a projection in one group
    assert len(decoded) == 2 * len(each)


@CHECKPOINTING
def test_native_products_run_up_twice_and_down_once_before_they_are_pulled_back(
    base: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: dict[str, Any] | None
) -> None:
    if native_products(torch.float32) is None:
        pytest.skip("no C compiler, or no AVX-512")
    model = model_in_training(base, torch.float32, checkpointing)
    met: list[tuple[bool, bool]] = []  # of each product whether it is up, and pulled back
    multiply = NativeProducts.multiply

    def count(self: NativeProducts, parts: Any, blocks: Tensor, *arguments: Any, **named: Any) -> Tensor:
        met.append((any(blocks is each for each in ups), named.get("transposed", False)))
        return multiply(self, parts, blocks, *arguments, **named)

    ups = [module.gate_up_proj for module in model.modules() if isinstance(module, PackedExperts)]
    monkeypatch.setattr(NativeProducts, "multiply", count)
    loss_and_gradients(model)
    up, down = [back for is_up, back in met if is_up], [back for is_up, back in met if not is_up]
    assert sorted(up) == [False] * 2 * LAYERS + [True] * LAYERS
    assert sorted(down) == [False] * LAYERS + [True] * LAYERS


@contextmanager
def kept_bytes(model: Any) -> Iterator[dict[int, int]]:
    """Bytes of what is kept for backward, weights apart, by place in memory."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)


def test_checkpointing_keeps_less(base: Path) -> None:
    kept, ids = {}, random_ids(1, 60)
    for name, checkpointing in (("plain", None), ("selective", {"use_reentrant": False})):
        model = model_in_training(base, torch.float32, checkpointing)
        with kept_bytes(model) as sizes:
            model(ids, labels=ids, use_cache=False)
        kept[name] = sum(sizes.values())
    assert kept["selective"] < 0.6 * kept["plain"]


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_layer_keeps_its_input_and_the_stream_between_its_halves(base: Path, offloaded: bool) -> None:
    """With offloading the experts' input, too, which then is out of the way."""
    model, tokens = model_in_training(base, torch.float32, {"use_reentrant": False}), 600
    if offloaded:
        keep_all_inputs(model)
    ids = random_ids(1, tokens)
    with kept_bytes(model) as sizes:
        hidden = model.base_model.model.model(ids, use_cache=False).last_hidden_state
    of_a_row = hidden.nbytes
    large = [size for size in sizes.values() if size >= of_a_row]
    # One more for the final norm; what the experts' inputs are made of is what the router keeps anyway.
    assert len(large) == LAYERS * (3 if offloaded else 2) + 1 and set(large) == {of_a_row}


def test_a_layer_that_keeps_its_attention_does_not_run_it_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three layers attends to all earlier tokens; keys and values are not kept with the result."""
    model, runs = model_in_training(base, torch.float32, {"use_reentrant": False}), []
    attend_by_blocks = attention.attend_by_blocks

    def counted(*arguments: Any) -> Tensor:
        runs.append(arguments[5])
        return attend_by_blocks(*arguments)

    monkeypatch.setattr(attention, "attend_by_blocks", counted)
    loss_and_gradients(model)
    assert runs.count(None) == 2 and len(runs) == 2 * LAYERS
    keep_attention(model, 5)
    runs.clear()
    with kept_bytes(model) as sizes:
        ids = random_ids(1, 600)
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert runs.count(None) == 1 and len(runs) == 2 * LAYERS - 1
    full = model.base_model.model.model.layers[1].self_attn
    keys = 600 * full.k_proj.base_layer.out_features * 4
    assert keys not in sizes.values()


def test_generation_after_training_uses_its_cache(base: Path) -> None:
    model = model_in_training(base, torch.float32, {"use_reentrant": False})
    ids = random_ids(1, 12)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    fresh = model_in_training(base, torch.float32, None).eval()
    assert torch.equal(
        fresh.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), expected
    )
