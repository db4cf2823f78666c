"""Experts that stay in host memory: the same results, foreseen after a step, two chunks on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from finetune.errors import FinetuneError
from finetune.model import add_lora, load_base
from finetune.model.kernels import stream as streaming
from finetune.model.kernels import wide
from finetune.model.kernels.budget import Budget
from finetune.model.kernels.steps import TorchSteps
from finetune.model.kernels.stream import ExpertStream, transfer_seconds
from finetune.model.kernels.wide import Wide
from tests.checkpoints import write_random_checkpoint
from tests.unit.test_model_expert_layer import EXPERTS, make_case, make_layer, run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_experts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "EXPERTS", 2)


def two_layers(stream: ExpertStream | None) -> list[Any]:
    """Layers that share scratch memory, as those of a model do."""
    layers = [make_layer(torch.float32, seed=seed) for seed in (3, 4)]
    for layer in layers:
        layer.base.scratch = layers[0].base.scratch
        if stream is not None:
            layer.base.keep_on_host(stream)
    layers[0].base.scratch.back_ends[CPU, torch.float32] = Wide(TorchSteps(), Budget(1 << 30))
    return layers


def step(layers: list[Any]) -> list[torch.Tensor]:
    """Forward through both layers and back; the output and the gradients of x and all factors."""
    case = make_case()
    x = case.x.float().requires_grad_()
    out = x
    for layer in layers:
        out = layer(out, case.indices, case.scores.float())
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [x, *trained], case.d_out.float())]


def test_results_are_exactly_those_of_resident_experts() -> None:
    streamed, resident = step(two_layers(ExpertStream(CPU))), step(two_layers(None))
    assert len(streamed) == 10
    assert all(torch.equal(a, b) for a, b in zip(streamed, resident, strict=True))


def test_after_the_first_step_everything_is_foreseen() -> None:
    stream = ExpertStream(CPU)
    layers, chunks = two_layers(stream), EXPERTS // 2
    first = step(layers)
    assert (stream.hits, stream.misses) == (0, 4 * chunks)
    second = step(layers)
    # But for the very first, which follows nothing: it was not known that another step would come.
    assert (stream.hits, stream.misses) == (4 * chunks - 1, 4 * chunks + 1)
    step(layers)
    assert stream.misses == 4 * chunks + 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_order_costs_waiting_and_nothing_else() -> None:
    stream = ExpertStream(CPU)
    layers = two_layers(stream)
    expected = step(layers)
    with torch.no_grad():  # as evaluation in the middle of training does
        layers[0](make_case().x.float(), make_case().indices, make_case().scores.float())
    found = step(layers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_device_holds_two_chunks_and_the_packed_bytes_do_not_move_there() -> None:
    stream = ExpertStream(CPU)
    layer = two_layers(stream)[0]
    run(layer, make_case(), torch.float32)
    packed = {name: p for name, p in layer.base.named_parameters() if p.dtype == torch.uint8}
    two_experts = sum(parameter[:2].numel() for parameter in packed.values())
    for buffer in (stream._current, stream._next):
        assert sum(memory.numel() for memory in buffer.memory) == two_experts
    moved = layer.to("meta")
    kinds = {parameter.dtype: parameter.device.type for parameter in moved.base.parameters()}
    assert kinds[torch.uint8] == "cpu" and kinds[torch.float32] == "meta"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_the_adapter_is_where_the_model_computes_and_not_where_the_experts_are(folder: Path) -> None:
    base = write_random_checkpoint(folder / "packed")
    elsewhere = torch.device("meta")
    model = load_base(base, dtype=torch.float32, device=elsewhere, experts_on="host")
    assert model.model.layers[0].mlp.experts.gate_up_proj.device == CPU
    adapted = add_lora(model, rank=4, alpha=8, targets=["attention", "experts"])
    places = {parameter.device for parameter in adapted.parameters() if parameter.requires_grad}
    assert places == {elsewhere}


def test_experts_in_bf16_cannot_stay_on_the_host(folder: Path) -> None:
    base = write_random_checkpoint(folder / "dense", experts_as="bf16")
    with pytest.raises(FinetuneError, match="needs experts in MXFP4; this checkpoint has them in bf16"):
        load_base(base, dtype=torch.float32, device="meta", experts_on="host")


def test_a_step_brings_every_expert_twice() -> None:
    assert transfer_seconds(61e9, 50e9) == pytest.approx(2.44)


# Host memory


class Cudart:
    """Stands in for CUDA's runtime: notes what is registered and what is let go, or refuses."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.registered = answer, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_pinned_memory_is_let_go_by_cuda_before_the_system_gets_it_back(cudart: Cudart) -> None:
    packed = torch.randint(256, (3, 5, 16), dtype=torch.uint8)
    pinned = streaming.pin(packed)
    part = pinned[1:]
    assert torch.equal(pinned, packed) and cudart.registered == {pinned.data_ptr(): 240}
    del pinned
    assert cudart.registered, "a part of it is still in use"
    assert torch.equal(part, packed[1:])
    del part
    assert not cudart.registered


def test_where_pinning_is_refused_one_warning_says_so_and_the_bytes_are_there(
    cudart: Cudart, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")  # that of the registration, as CUDA reports it next

    cudart.answer = 2
    monkeypatch.setattr(torch, "ones", launch)
    streaming._warn_of_slow_copies.cache_clear()
    packed = torch.randint(256, (3, 16), dtype=torch.uint8)
    copies = [streaming.pin(packed) for _ in range(3)]
    assert all(torch.equal(copy, packed) for copy in copies)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the system refuses to pin host memory (CUDA error 2)"
    ]
    del copies
    assert cudart.registered, "what was refused is not to be let go"


def test_experts_that_the_host_has_no_room_for_are_refused_before_they_are_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_random_checkpoint(folder / "too large")
    monkeypatch.setattr(streaming, "pin", pytest.fail)
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    said = r"model\.experts_on: host keeps 0\.0 GB of experts in host memory, and 0\.0 GB of it are free here"
    with pytest.raises(FinetuneError, match=said):
        load_base(base, dtype=torch.float32, device="meta", experts_on="host")
