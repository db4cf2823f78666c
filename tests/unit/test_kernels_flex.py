"""FlexAttention with sinks over packed documents, run by torch step by step, which needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import AuxRequest

from finetune.model import attention
from finetune.model.attention import Packing
from finetune.model.kernels import flex
from tests.unit import test_model_attention as packed_attention
from tests.unit.test_model_attention import WINDOWS, positions, random_inputs

SOME_LENGTHS = [[1], [129], [1, 127, 128, 129], [129, 1, 1, 126, 43], [3] * 90]
NUMBERS = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")


@pytest.fixture
def on_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send our attention through FlexAttention, which refuses gradients on a CPU though it has them there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "attend_packed", flex.attend_flex)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", SOME_LENGTHS, ids=packed_attention.named)
def test_outputs_and_gradients_are_those_of_dense_attention(
    on_flex: None, lengths: list[int], window: int | None
) -> None:
    inputs = random_inputs(1, sum(lengths), torch.float32)
    packed_attention.assert_outputs_and_gradients_agree(inputs, positions(lengths), window, 1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_a_batch_are_packed_each_in_its_own_way(on_flex: None, window: int | None) -> None:
    both = torch.cat([positions([1, 200, 99]), positions([150, 150])])
    inputs = random_inputs(2, 300, torch.float32)
    packed_attention.assert_outputs_and_gradients_agree(inputs, both, window, 1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_bfloat16_is_within_its_roundings_of_float64(on_flex: None, window: int | None) -> None:
    inputs = random_inputs(1, 300, torch.bfloat16)
    packed_attention.assert_outputs_and_gradients_agree(inputs, positions([170, 130]), window, 8 * 2**-9)


def test_a_sink_far_above_all_scores_leaves_nothing_and_one_far_below_changes_nothing(on_flex: None) -> None:
    query, key, value, _ = random_inputs(1, 140, torch.float32)
    packing = Packing(positions([100, 40]), 20)
    sinks = torch.tensor([-200.0, 200.0, -200.0, 200.0])
    out, _ = attention.attend(nn.Identity(), query, key, value, packing, 0.3, s_aux=sinks)
    without = flex_attention.flex_attention(
        query, key, value, scale=0.3, enable_gqa=True, block_mask=packing.flex_masks[None]
    ).transpose(1, 2)
    assert torch.equal(out[:, :, 0::2], without[:, :, 0::2]) and not out[:, :, 1::2].any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.sampled_from(WINDOWS))
def test_blocks_are_those_that_torch_finds_by_looking_at_every_query_and_key(
    lengths: list[int], window: int | None
) -> None:
    packing, length = Packing(positions(lengths), 7), sum(lengths)
    found = flex.block_mask(packing.starts, window)
    expected = flex_attention.create_block_mask(found.mask_mod, 1, 1, length, length, device="cpu")
    for name in NUMBERS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_a_windowed_layer_meets_two_blocks_of_keys_a_block_of_queries_however_long() -> None:
    packing = Packing(positions([128 * 300]), 128)
    mask = flex.block_mask(packing.starts, 128)
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks.max() == 2 and not mask.full_kv_num_blocks.any()


def test_masks_are_made_once_for_all_layers(on_flex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int | None] = []
    block_mask = flex.block_mask

    def counted(starts: torch.Tensor, window: int | None) -> Any:
        made.append(window)
        return block_mask(starts, window)

    monkeypatch.setattr(flex, "block_mask", counted)
    query, key, value, sinks = random_inputs(1, 140, torch.float32)
    packing = Packing(positions([140]), 20)
    for window in (None, 20, None, 20):
        attention.attend(nn.Identity(), query, key, value, packing, 0.3, sliding_window=window, s_aux=sinks)
    assert made == [None, 20]


def test_packs_of_other_documents_are_no_compilations_of_their_own(on_flex: None) -> None:
    """A compilation takes seconds on a GPU, and every pack has documents of its own."""
    counter = CompileCounter()
    compiled: Any = torch.compile(flex_attention.flex_attention, dynamic=False, backend=counter)
    query, key, value, _ = random_inputs(1, 256, torch.float32)
    for window, counted in ((None, 1), (128, 2)):
        for lengths in ([256], [100, 156], [7] * 36 + [4]):
            mask = flex.block_mask(Packing(positions(lengths), 128).starts, window)
            compiled(query, key, value, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
            assert counter.frame_count == counted


def test_where_it_does_not_work_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")

    def answer(change: Any) -> bool:
        flex.flex_is_right.cache_clear()
        monkeypatch.setattr(flex, "attend_flex", change)
        try:
            return flex.flex_is_right(cpu, torch.float32)
        finally:
            flex.flex_is_right.cache_clear()

    right = flex.attend_flex
    assert not answer(right) and "does not support backward on CPU" in caplog.text
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    assert answer(right)
    caplog.clear()
    assert not answer(lambda *a: right(*a) * 1.2) and "output with window None differs" in caplog.text
    assert not answer(lambda q, k, v, sinks, *a: right(q, k, v, sinks.detach() + 0 * sinks, *a))
