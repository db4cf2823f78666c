"""The GPU's back end of the expert layer, its steps in plain torch: right in any chunks, in any memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from finetune.model.kernels import products, wide
from finetune.model.kernels.budget import FEWEST_ROWS, MOST_EXPERTS, Budget
from finetune.model.kernels.steps import TorchSteps
from finetune.model.kernels.stream import ExpertStream
from finetune.model.kernels.wide import Wide
from tests.model_kit import relative_error
from tests.unit.test_model_expert_layer import (
    EXPERTS,
    TOLERANCE,
    Layer,
    assert_close,
    make_case,
    make_layer,
    reference,
    run,
)

CPU = torch.device("cpu")
# All experts at once, two or three at a time, one at a time.
BUDGETS = [1 << 30, 1 << 20, 1]


def on_gpu_path(layer: Layer, dtype: torch.dtype, budget: int = 1 << 30) -> Layer:
    layer.base.scratch.back_ends[CPU, dtype] = Wide(TorchSteps(), Budget(budget))
    return layer


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rank", [None, 3, 8])
def test_outputs_and_all_gradients_are_the_references(
    dtype: torch.dtype, rank: int | None, budget: int
) -> None:
    layer, case = on_gpu_path(make_layer(dtype, rank=rank), dtype, budget), make_case()
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


@pytest.mark.parametrize("case", [make_case(among=3), make_case(tokens=1), make_case(size=16.0)])
def test_idle_experts_single_tokens_and_clamped_values_are_the_references(
    dtype: torch.dtype, case: Any
) -> None:
    layer = on_gpu_path(make_layer(dtype), dtype)
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


def test_dense_experts_give_what_packed_ones_give(dtype: torch.dtype) -> None:
    case = make_case()
    dense, packed = (on_gpu_path(make_layer(dtype, dense=dense), dtype) for dense in (True, False))
    assert_close(run(dense, case, dtype), run(packed, case, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("part", [5, 1 << 20])
def test_no_sum_over_rows_is_asked_of_an_expert_without_rows(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a product hangs Hopper GPUs in some builds of torch."""
    grouped_mm, asked = F.grouped_mm, []

    def watched(left: Any, right: Any, *, offs: Any) -> Any:
        if right.dim() == 2:
            asked.append(int(torch.diff(offs, prepend=offs.new_zeros(1)).min()))
        return grouped_mm(left, right, offs=offs)

    monkeypatch.setattr("finetune.model.kernels.budget.FEWEST_ROWS", part)
    # As with experts on the host: all together, whatever their rows, which are cut into parts.
    monkeypatch.setattr(wide, "EXPERTS", EXPERTS)
    monkeypatch.setattr(F, "grouped_mm", watched)
    products.grouped_mm_is_right.cache_clear()
    layer, case = on_gpu_path(make_layer(torch.float32), torch.float32, 1), make_case(among=3)
    layer.base.keep_on_host(ExpertStream(CPU))
    assert_close(run(layer, case, torch.float32), reference(layer, case), TOLERANCE[torch.float32])
    assert asked and min(asked) > 0


@pytest.mark.parametrize("part", [1, 5])
def test_rows_of_an_expert_taken_in_parts_add_up(
    dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.kernels.budget.FEWEST_ROWS", part)
    layer, case = on_gpu_path(make_layer(dtype), dtype, 1), make_case()
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])


def test_bfloat16_is_as_close_to_float64_as_the_back_end_of_cpus() -> None:
    case, layer = make_case(tokens=100), make_layer(torch.bfloat16)
    expected = reference(layer, case)

    def errors() -> list[float]:
        found = run(layer, case, torch.bfloat16)
        return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]

    of_cpus = errors()
    on_gpu_path(layer, torch.bfloat16)
    # Roundings fall otherwise, so that an error may be half again as large where the other is small.
    assert all(here < 1.5 * there for here, there in zip(errors(), of_cpus, strict=True))


def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    layer, case = on_gpu_path(make_layer(dtype), dtype, 1 << 20), make_case(tokens=100)
    first, second = run(layer, case, dtype), run(layer, case, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_experts_that_get_a_gradient_are_noted_while_watched(dtype: torch.dtype) -> None:
    layer, case = on_gpu_path(make_layer(dtype), dtype), make_case(tokens=2, among=4)
    case.d_out[1] = 0
    layer.base.watch_gradients(True)
    run(layer, case, dtype)
    assert layer.base.live_experts.nonzero().flatten().tolist() == sorted(set(case.indices[0].tolist()))


def test_where_memory_runs_out_less_is_worked_on_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, case = on_gpu_path(make_layer(dtype), dtype), make_case()
    multiply, most = products.multiply, 2

    def scarce(rows: Any, weights: Any, ends: Any) -> Any:
        if weights.shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return multiply(rows, weights, ends)

    monkeypatch.setattr(wide, "multiply", scarce)
    assert_close(run(layer, case, dtype), reference(layer, case), TOLERANCE[dtype])
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        run(layer, case, dtype)


# Products


@pytest.mark.parametrize("broken", ["multiply", "outer"])
def test_a_torch_whose_grouped_product_is_wrong_is_found_out_and_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = F.grouped_mm

    def wrong(left: Any, right_hand: Any, *, offs: Any) -> Any:
        out = right(left, right_hand, offs=offs)
        return out.flip(-1) if (left.stride(0) == 1) == (broken == "outer") else out

    products.grouped_mm_is_right.cache_clear()
    monkeypatch.setattr(F, "grouped_mm", wrong)
    try:
        layer, case = on_gpu_path(make_layer(torch.float32), torch.float32), make_case()
        assert_close(run(layer, case, torch.float32), reference(layer, case), TOLERANCE[torch.float32])
    finally:
        products.grouped_mm_is_right.cache_clear()
    assert "grouped_mm is not usable on cpu" in caplog.text


def test_this_torch_has_a_grouped_product_that_is_right() -> None:
    assert products.grouped_mm_is_right(CPU, torch.float32)
    assert not products.grouped_mm_is_right(CPU, torch.float64)


# Budgets


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=64), st.integers(1, 10**6), st.integers(1, 1000),
    st.integers(0, 10**8),
)  # fmt: skip
def test_chunks_cover_every_row_once_and_stay_within_the_budget(
    counts: list[int], expert_bytes: int, row_bytes: int, budget: int
) -> None:
    ends = torch.tensor(counts).cumsum(0).tolist()
    chunks = list(Budget(budget).chunks(ends, expert_bytes, row_bytes))
    rows = [row for chunk in chunks for part in chunk.parts for row in range(part.start, part.stop)]
    assert rows == list(range(sum(counts)))
    for chunk in chunks:
        experts, most = chunk.last - chunk.first, max(part.stop - part.start for part in chunk.parts)
        first_row, last_row = (ends[chunk.first - 1] if chunk.first else 0), ends[chunk.last - 1]
        assert chunk.parts[0].start == first_row and chunk.parts[-1].stop == last_row
        assert experts <= MOST_EXPERTS
        fewest = experts == 1 and most <= FEWEST_ROWS
        assert fewest or experts * expert_bytes + most * row_bytes <= budget


def test_a_budget_is_halved_until_it_holds_less_than_one_expert() -> None:
    budget = Budget(1 << 20)
    halvings = 0
    while budget.halve(expert_bytes=1000):
        halvings += 1
    assert halvings == 11 and budget.bytes == 512


def test_the_budgets_of_these_tests_make_one_chunk_several_and_one_an_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    chunks = Budget.chunks

    def counted(budget: Budget, *arguments: Any) -> Any:
        found = list(chunks(budget, *arguments))
        seen.append(len(found))
        return iter(found)

    monkeypatch.setattr(Budget, "chunks", counted)
    for budget in BUDGETS:
        run(on_gpu_path(make_layer(torch.float32), torch.float32, budget), make_case(), torch.float32)
    forward = seen[::2]
    assert forward[0] == 1 < forward[1] < forward[2] == EXPERTS
