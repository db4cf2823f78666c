"""Attention over packed documents: no token sees another document, and no L x L matrix is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.model.attention import BLOCK_KEYS, BLOCK_QUERIES, Packing, attend
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import our_model, random_ids, relative_error, stock_model

# Around one and two blocks of queries, longer than the window, shorter than it, and a single token.
LENGTHS = [[1], [127], [128], [129], [300], [1, 127, 128, 129], [129, 1, 1, 126, 43], [3] * 90]
WINDOWS = [None, 1, 20, 128, 1000]


def named(lengths: list[int]) -> str:
    return "+".join(map(str, lengths)) if len(lengths) < 9 else f"{len(lengths)}-of-{lengths[0]}"


def positions(lengths: Sequence[int]) -> Tensor:
    """`[1, L]`, restarting with each document."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


# The function itself


def random_inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2, and sinks."""
    random = torch.Generator().manual_seed(length)
    shapes = (batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 8), (4,)
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in inputs]


def packed(inputs: list[Tensor], position_ids: Tensor, window: int | None) -> Tensor:
    """Our attention, `[B, L, Hq, D]`."""
    query, key, value, sinks = inputs
    packing = Packing(position_ids, window or 7)
    scale = query.shape[-1] ** -0.5
    return attend(nn.Identity(), query, key, value, packing, scale, sliding_window=window, s_aux=sinks)[0]


def dense(inputs: list[Tensor], position_ids: Tensor, window: int | None) -> Tensor:
    """The same by the definition: one softmax over all keys that may be seen and the sink."""
    query, key, value, sinks = inputs
    batch, heads, length, size = query.shape
    key, value = (x.repeat_interleave(heads // 2, dim=1) for x in (key, value))
    document = (position_ids == 0).cumsum(1)
    place = torch.arange(length)
    seen = (document.unsqueeze(2) == document.unsqueeze(1)) & (place.unsqueeze(1) >= place)
    if window is not None:
        seen &= place.unsqueeze(1) - place < window
    scores = query @ key.transpose(2, 3) * size**-0.5
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    with_sink = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(batch, -1, length, 1)], dim=-1)
    return (with_sink.softmax(-1)[..., :-1] @ value).transpose(1, 2)


def assert_outputs_and_gradients_agree(
    inputs: list[Tensor], position_ids: Tensor, window: int | None, tolerance: float
) -> None:
    """Our result and the gradients of queries, keys, values and sinks, against float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = packed(inputs, position_ids, window), dense(wide, position_ids, window)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [out, *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]
    wanted = [expected, *torch.autograd.grad(expected, wide, d_out)]
    for a, b in zip(found, wanted, strict=True):
        error, size = float((a.detach().double() - b.detach()).abs().max()), float(b.detach().abs().max())
        # In a document of one token the score has no say: the gradients of queries and keys vanish but for
        # the sink's share, so errors are measured against 1e-3 at least.
        assert error <= tolerance * max(1e-3, size)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=named)
def test_outputs_and_gradients_are_those_of_dense_attention(lengths: list[int], window: int | None) -> None:
    inputs = random_inputs(1, sum(lengths))
    assert_outputs_and_gradients_agree(inputs, positions(lengths), window, 1e-11)


@pytest.mark.parametrize("window", [None, 20])
def test_float32_is_within_its_roundings_of_float64(window: int | None) -> None:
    inputs = random_inputs(1, 300, torch.float32)
    assert_outputs_and_gradients_agree(inputs, positions([170, 130]), window, 1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_bfloat16_is_within_its_roundings_of_float64(window: int | None) -> None:
    inputs = random_inputs(1, 300, torch.bfloat16)
    # Up to 2 ** -9 each for the scores, the probabilities, the products and the result.
    assert_outputs_and_gradients_agree(inputs, positions([170, 130]), window, 8 * 2**-9)


@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_a_batch_are_packed_each_in_its_own_way(window: int | None) -> None:
    both = torch.cat([positions([1, 200, 99]), positions([150, 150])])
    assert_outputs_and_gradients_agree(random_inputs(2, 300), both, window, 1e-11)


@pytest.mark.parametrize("window", [None, 20])
def test_one_row_of_positions_serves_a_batch(window: int | None) -> None:
    inputs, one = random_inputs(2, 140), positions([100, 40])
    assert torch.equal(packed(inputs, one, window), packed(inputs, one.expand(2, -1), window))


def test_documents_need_not_begin_at_position_zero() -> None:
    inputs, where = random_inputs(1, 200), positions([150, 50])
    moved = where + torch.cat([torch.full((1, 150), 9), torch.full((1, 50), 1000)], dim=1)
    assert torch.equal(packed(inputs, moved, None), packed(inputs, where, None))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.sampled_from(WINDOWS))
def test_any_documents_give_what_dense_attention_gives(lengths: list[int], window: int | None) -> None:
    assert_outputs_and_gradients_agree(random_inputs(1, sum(lengths)), positions(lengths), window, 1e-11)


def test_results_repeat_bit_for_bit() -> None:
    inputs, where = random_inputs(1, 300, torch.float32), positions([170, 130])
    first, second = (
        [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
        for out in (packed(inputs, where, 20) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scores_too_large_for_their_exponential_do_not_overflow() -> None:
    inputs = [tensor.detach() * 1e3 for tensor in random_inputs(1, 140, torch.float32)]
    out = packed([tensor.requires_grad_() for tensor in inputs], positions([140]), 20)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


# Which keys a block of queries meets, and what memory that takes


@pytest.mark.parametrize("window", [1, 20, 128])
def test_a_windowed_layer_meets_at_most_window_and_block_keys(window: int) -> None:
    for block in Packing(positions([1000, 500]), window).blocks:
        assert block.last - block.first_key_in_window < window + BLOCK_QUERIES + BLOCK_KEYS


def test_keys_come_in_whole_blocks_as_far_as_there_are_any() -> None:
    for block in Packing(positions([301, 77, 500]), 100).blocks:
        for first in (block.first_key, block.first_key_in_window):
            assert first == 0 or (block.last - first) % BLOCK_KEYS == 0


def test_a_full_layer_meets_only_the_documents_of_its_block() -> None:
    blocks = Packing(positions([200] * 10), 128).blocks
    firsts = [block.first // 200 * 200 for block in blocks]
    assert all(key - BLOCK_KEYS < b.first_key <= key for b, key in zip(blocks, firsts, strict=True))


def test_blocks_cover_every_query_once() -> None:
    blocks = Packing(positions([129, 300]), 128).blocks
    queries = [query for block in blocks for query in range(block.first, block.last)]
    assert queries == list(range(429))


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("length", [512, 2048])
def test_a_windowed_layer_makes_no_tensor_that_grows_with_the_square_of_the_length(length: int) -> None:
    window = 32
    inputs = random_inputs(1, length, torch.float32)
    with LargestTensor() as forward:
        out = packed(inputs, positions([length]), window)
    with LargestTensor() as backward:
        out.sum().backward()
    assert forward.operations > 0 and backward.operations > 20
    queries = 4 * length * 8
    scores = 4 * BLOCK_QUERIES * (BLOCK_QUERIES + window)
    assert max(forward.elements, backward.elements) <= max(queries, scores) < length * length


def test_a_full_layer_makes_no_tensor_of_length_by_length_for_each_head() -> None:
    inputs = random_inputs(1, 1024, torch.float32)
    with LargestTensor() as largest:
        packed(inputs, positions([1024]), None).sum().backward()
    assert largest.elements <= 4 * BLOCK_QUERIES * 1024


# The whole model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "base"
    return write_random_checkpoint(path, layers=4, sliding_window=24)


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> Any:
    return our_model(checkpoint)


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Any:
    return stock_model(checkpoint)


def logits(model: Any, ids: Tensor, position_ids: Tensor | None = None, **settings: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids, position_ids=position_ids, use_cache=False, **settings).logits
    return out


def packed_against_alone(model: Any, lengths: list[int]) -> float:
    """Largest difference of a document's logits in the pack and alone."""
    ids = random_ids(1, sum(lengths))
    together = logits(model, ids, positions(lengths)).split(lengths, dim=1)
    alone = [logits(model, document) for document in ids.split(lengths, dim=1)]
    return max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("lengths", [*LENGTHS[5:], [128, 128], [50, 60]], ids=named)
def test_packed_documents_get_the_logits_of_each_document_alone(ours: Any, lengths: list[int]) -> None:
    assert packed_against_alone(ours, lengths) < 1e-5


def test_stock_transformers_lets_packed_documents_see_each_other(ours: Any, stock: Any) -> None:
    """Why this attention exists: should transformers mend this, it is said here first."""
    assert packed_against_alone(stock, [50, 60]) > 0.01
    ids, where = random_ids(1, 110), positions([50, 60])
    difference = (logits(ours, ids, where) - logits(stock, ids, where)).abs()
    assert difference[:, 50:].max() > 0.01 and difference[:, :50].max() < 1e-5


def test_a_single_document_gets_stock_logits(ours: Any, stock: Any) -> None:
    ids = random_ids(2, 150)
    assert (logits(ours, ids) - logits(stock, ids)).abs().max() < 1e-5


def test_padding_that_is_its_own_document_leaves_the_rest_alone(ours: Any) -> None:
    ids = random_ids(1, 60)
    padded = torch.cat([ids, torch.zeros(1, 20, dtype=torch.long)], dim=1)
    assert (logits(ours, padded, positions([60, 20]))[:, :60] - logits(ours, ids)).abs().max() < 1e-5


def test_a_mask_of_ones_changes_nothing(ours: Any) -> None:
    ids, where = random_ids(1, 60), positions([35, 25])
    with_mask = logits(ours, ids, where, attention_mask=torch.ones_like(ids))
    assert torch.equal(with_mask, logits(ours, ids, where))


def test_right_padding_under_a_mask_leaves_the_rest_alone(ours: Any) -> None:
    ids = random_ids(1, 60)
    padded = torch.cat([ids, torch.zeros(1, 20, dtype=torch.long)], dim=1)
    mask = (torch.arange(80) < 60).long().unsqueeze(0)
    assert (logits(ours, padded, attention_mask=mask)[:, :60] - logits(ours, ids)).abs().max() < 1e-5


def test_rows_with_different_packings_get_their_own_logits(ours: Any) -> None:
    ids = random_ids(2, 140)
    both = logits(ours, ids, torch.cat([positions([100, 40]), positions([20, 120])]))
    assert (both[:1] - logits(ours, ids[:1], positions([100, 40]))).abs().max() < 1e-5
    assert (both[1:] - logits(ours, ids[1:], positions([20, 120]))).abs().max() < 1e-5


def test_embeddings_may_stand_in_for_tokens(ours: Any) -> None:
    ids, where = random_ids(1, 50), positions([30, 20])
    with torch.no_grad():
        embeddings = ours.model.embed_tokens(ids)
        out = ours(inputs_embeds=embeddings, position_ids=where, use_cache=False).logits
    assert relative_error(out, logits(ours, ids, where)) < 1e-6


def generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedily 40 tokens, past the window: the new tokens `[B, 40]` and their logits `[B, 40, V]`."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    """One shorter than the window, one longer."""
    return [random_ids(1, 9, seed=1), random_ids(1, 50, seed=2)]


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    return ids, mask


def test_generation_from_left_padded_prompts_is_that_of_each_alone(ours: Any, prompts: list[Tensor]) -> None:
    tokens, scores = generate(ours, *left_padded(prompts))
    for row, prompt in enumerate(prompts):
        alone_tokens, alone_scores = generate(ours, prompt)
        assert torch.equal(tokens[row : row + 1], alone_tokens)
        assert (scores[row : row + 1] - alone_scores).abs().max() < 1e-5


def test_generation_is_that_of_stock_transformers(ours: Any, stock: Any, prompts: list[Tensor]) -> None:
    tokens, scores = generate(ours, *left_padded(prompts))
    stock_tokens, stock_scores = generate(stock, *left_padded(prompts))
    assert torch.equal(tokens, stock_tokens)
    assert (scores - stock_scores).abs().max() < 1e-5


def test_generation_with_a_cache_is_what_the_model_says_without(ours: Any, prompts: list[Tensor]) -> None:
    tokens, scores = generate(ours, prompts[1])
    whole = torch.cat([prompts[1], tokens], dim=1)
    assert (logits(ours, whole)[:, 49:-1] - scores).abs().max() < 1e-5


def test_a_first_pass_that_fills_a_cache_respects_documents_too(ours: Any) -> None:
    ids, where = random_ids(1, 50), positions([30, 20])
    with torch.no_grad():
        cached = ours(ids, position_ids=where, use_cache=True).logits
    assert relative_error(cached, logits(ours, ids, where)) < 1e-6
