"""What is predicted: sizes by counting, growth in the right things, advice that holds, a table of GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssForCausalLM

from finetune.errors import FinetuneError
from finetune.model import add_lora, inspect_checkpoint, load_base
from finetune.predict import (
    RELEASED,
    Shape,
    Workload,
    gpu,
    predict,
    predict_memory,
    predict_speed,
    require_memory,
)
from finetune.predict.advice import smallest_change
from finetune.predict.machines import found_gpu
from finetune.predict.speed import useful_flops
from finetune.recipe import Recipe
from tests.checkpoints import NANO, write_random_checkpoint
from tests.measure.hardware_table import table

RECIPE = Recipe.model_validate(
    {"name": "r", "model": {"base": "openai/gpt-oss-20b"}, "data": {"train": [{"path": "rows.jsonl"}]}}
)
SMALL, LARGE = RELEASED["openai/gpt-oss-20b"], RELEASED["openai/gpt-oss-120b"]


def work(**changes: object) -> Workload:
    plain = Workload(8192, 1, 16, ["attention", "experts"], "bf16", True, "adamw_8bit", 4096)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_releases_are_sized_as_published(shared: Path) -> None:
    for name, total, file_gb in (("gpt-oss-20b", 20.9e9, 13.76e9), ("gpt-oss-120b", 116.8e9, 65.25e9)):
        shape = RELEASED[f"openai/{name}"]
        assert Shape.of(json.loads((shared / "released" / name / "config.json").read_text())) == shape
        assert shape.expert_weights + shape.expert_biases + shape.dense_weights == pytest.approx(
            total, rel=2e-3
        )
        stored = 17 / 32 * shape.expert_weights + 2 * (shape.expert_biases + shape.dense_weights)
        assert stored == pytest.approx(file_gb, rel=1e-3)


@pytest.mark.parametrize("targets", [["attention"], ["experts"], ["attention", "experts", "router"]])
def test_weights_are_counted_as_the_model_has_them(tmp_path: Path, targets: list[str]) -> None:
    path = write_random_checkpoint(tmp_path / "base", layers=3)
    info = inspect_checkpoint(path)
    shape = Shape.of(info.config)
    assert shape.expert_weights + shape.expert_biases + shape.dense_weights == info.weights
    model = add_lora(load_base(path, dtype=torch.float32, device="cpu"), rank=3, alpha=6, targets=targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.lora_weights(3, targets) == trained


def test_flops_are_those_that_torch_counts_for_stock_transformers() -> None:
    """Forward of nano, whose products are counted by torch's own counter; ours are 4 a weight for a step."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape.of(inspect_checkpoint(NANO).config)
    # The counter does not know grouped products: experts one by one.
    model = GptOssForCausalLM.from_pretrained(
        NANO, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = 256
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    counted = counter.get_total_flops() / tokens
    # Stock attention multiplies the whole square, and its windowed layers too.
    scores = 4 * shape.layers * shape.query * tokens
    bare = work(tokens=tokens, targets=[], document=0.0)
    windowed_half_block = 7 * 2 * shape.query * 64 * shape.layers
    ours = (useful_flops(shape, bare) - windowed_half_block) / 2
    assert ours == pytest.approx(counted - scores, rel=0.02)


@given(
    st.sampled_from(["tokens", "rank", "document"]),
    st.sampled_from([SMALL, LARGE]),
    st.booleans(),
    st.booleans(),
)
def test_more_never_takes_less(key: str, shape: Shape, checkpointing: bool, wide: bool) -> None:
    machine = gpu("h100-80")
    small = work(checkpointing=checkpointing, dense="float32" if wide else "bf16")
    large = replace(small, **{key: 2 * getattr(small, key)})
    assert predict_memory(shape, large, machine).total >= predict_memory(shape, small, machine).total
    time = [predict_speed(shape, one, machine) for one in (small, large)]
    assert time[1].step_seconds >= time[0].step_seconds


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_parts_are_the_whole(kind: str) -> None:
    memory = predict_memory(LARGE, work(), replace(gpu("h200"), kind=kind))
    said = memory.to_dict()
    sizes = {key: size for key, size in said.items() if isinstance(size, int)}
    assert sum(sizes.values()) == pytest.approx(2 * sizes["total"], rel=1e-6)
    assert said["experts"] == pytest.approx(60.9e9, rel=0.01)


def test_unknown_gpus_are_named_with_what_was_meant() -> None:
    with pytest.raises(FinetuneError, match=r"there is no GPU h10 .* did you mean h100-80\?"):
        gpu("h10")
    assert gpu("H200").memory > gpu("h100-80").memory > gpu("16gb").memory


@pytest.mark.parametrize(
    ("driver", "gib", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA L4", 22.5, "l4"),
    ],
)
def test_gpus_are_known_by_the_name_of_their_driver(driver: str, gib: float, rate: str) -> None:
    found = found_gpu(driver, gib * 2**30)
    assert found is not None and found.matrix == gpu(rate).matrix and found.bandwidth == gpu(rate).bandwidth
    assert found_gpu("Matrox Millennium", 2**23) is None


@pytest.mark.parametrize("name", ["rtx4090", "16gb", "a100-40"])
def test_advice_makes_it_fit_and_less_would_not(name: str) -> None:
    """The advised recipe fits; one change alone is advised only where one is enough."""
    machine = gpu(name)
    recipe = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"tokens_per_pass": 32768})})

    def need(one: Recipe) -> float:
        return predict_memory(SMALL, Workload.of(one), machine).total

    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 128})})
    assert need(recipe) > machine.memory
    change = smallest_change(recipe, need, machine.memory)
    assert change.overrides
    values = [override.split("=") for override in change.overrides]
    data = recipe.model_dump()
    for key, value in values:
        section, field = key.split(".")
        data[section][field] = json.loads(value) if value in ("true", "false") or value.isdigit() else value
    advised = Recipe.model_validate(data)
    assert need(advised) == pytest.approx(change.bytes)
    assert (need(advised) <= machine.memory) == change.enough


def test_a_run_whose_host_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.predict.memory_here", lambda: gpu("h200"))
    monkeypatch.setattr("finetune.predict.free_host_memory", lambda: 5e9)
    require_memory(RECIPE, SMALL, None)
    on_host = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"experts_on": "host"})})
    with pytest.raises(FinetuneError, match=r"keeps 10\.\d GB in the host's memory, which has 5\.0 GB free"):
        require_memory(on_host, SMALL, None)


def test_nothing_is_advised_where_it_fits() -> None:
    found = predict(RECIPE, SMALL, gpu("h200"))
    assert found.fits and found.change is None and found.steps is None and found.cost is None


def test_the_readme_shows_what_is_predicted() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in text, "python -m tests.measure.hardware_table prints it anew"
