"""Packs hold every example once, whole, and with positions of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import Examples, PackedDataset, best_fit, collate
from finetune.data.packing import SHORT
from finetune.errors import FinetuneError

CAPACITY = 32
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def examples_of(sizes: list[int]) -> Examples:
    """Examples whose token ids are all different, all of them marked as learned."""
    total = sum(sizes)
    offsets = np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))]).astype(np.int64)
    return Examples(np.arange(total, dtype=np.int32), np.ones(total, dtype=np.uint8), offsets)


@given(lengths)
def test_best_fit_places_every_example_once_and_overfills_nothing(sizes: list[int]) -> None:
    packs = best_fit(sizes, CAPACITY)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    assert all(0 < sum(sizes[index] for index in pack) <= CAPACITY for pack in packs)


@given(lengths)
def test_best_fit_stays_within_the_bound_of_the_theorem(sizes: list[int]) -> None:
    fewest = -(-sum(sizes) // CAPACITY)
    packs = best_fit(sizes, CAPACITY)
    # Two packs that are both at most half full would have been one.
    assert sum(sum(sizes[index] for index in pack) <= CAPACITY // 2 for pack in packs) <= 1
    assert len(packs) <= 2 * fewest


@given(lengths)
def test_best_fit_is_what_trying_every_pack_gives(sizes: list[int]) -> None:
    spaces: list[int] = []
    for size in sorted(sizes, key=lambda size: -size if size > SHORT * CAPACITY else 0):
        fitting = [place for place, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=lambda place: spaces[place])] -= size
        else:
            spaces.append(CAPACITY - size)
    packed = [CAPACITY - sum(sizes[index] for index in pack) for pack in best_fit(sizes, CAPACITY)]
    assert sorted(packed) == sorted(spaces)


def test_packs_of_short_examples_hold_all_lengths_alike() -> None:
    sizes = np.random.default_rng(0).permutation([2, 12] * 300)
    short = [float(np.mean(sizes[pack] == 2)) for pack in best_fit(sizes, 128)[:-1]]
    assert min(short) > 0.2 and max(short) < 0.8


def test_an_example_longer_than_a_pass_is_refused_with_the_knob() -> None:
    with pytest.raises(
        FinetuneError, match=r"an example has 33 tokens and a pass holds 32; raise train\.tokens_per_pass"
    ):
        best_fit([3, 33], 32)


@given(lengths, st.integers(0, 3))
def test_a_pack_holds_whole_examples_with_positions_from_zero(sizes: list[int], seed: int) -> None:
    examples = examples_of(sizes)
    packed = PackedDataset(examples, CAPACITY, seed)
    seen = []
    for index in range(len(packed)):
        item = packed[index]
        assert {value.dtype for value in item.values()} == {torch.int64}
        assert packed.lengths[index] == len(item["input_ids"]) <= CAPACITY
        starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
            assert item["position_ids"][start:end].tolist() == list(range(end - start))
            assert item["labels"][start] == -100
            assert item["labels"][start + 1 : end].equal(item["input_ids"][start + 1 : end])
            seen.append(item["input_ids"][start:end].tolist())
    assert sorted(seen) == [example.ids.tolist() for example in examples]


def test_the_seed_decides_the_order_and_nothing_else_does() -> None:
    examples = examples_of([5, 9, 14, 30, 2, 7] * 20)
    one, same, other = (PackedDataset(examples, CAPACITY, seed) for seed in (1, 1, 2))
    assert one.packs == same.packs != other.packs


def test_what_is_not_learned_has_no_label() -> None:
    examples = Examples(
        np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], dtype=np.uint8), np.array([0, 4], dtype=np.int64)
    )
    assert PackedDataset(examples, CAPACITY)[0]["labels"].tolist() == [-100, -100, 2, 3]


def test_padding_is_a_document_of_its_own() -> None:
    packed = PackedDataset(examples_of([3, 30]), 30, seed=0)
    batch = collate([packed[0], packed[1]], pad_id=9)
    short = int((batch["labels"] != -100).sum(1).argmin())
    assert {tuple(value.shape) for value in batch.values()} == {(2, 30)}
    assert batch["input_ids"][short].tolist() == [0, 1, 2] + [9] * 27
    assert batch["labels"][short].tolist() == [-100, 1, 2] + [-100] * 27
    assert batch["position_ids"][short].tolist() == [0, 1, 2, *range(27)]


@pytest.mark.parametrize("multiple, length", [(1, 30), (10, 30), (32, 32), (7, 35)])
def test_a_batch_is_padded_to_a_multiple(multiple: int, length: int) -> None:
    packed = PackedDataset(examples_of([3, 30]), 30, seed=0)
    batch = collate([packed[0], packed[1]], multiple=multiple)
    assert {tuple(value.shape) for value in batch.values()} == {(2, length)}
    assert int((batch["labels"] != -100).sum()) == 2 + 29


def test_a_selection_of_examples_keeps_their_tokens() -> None:
    examples = examples_of([2, 3, 4])
    chosen = examples.select(np.array([2, 0]))
    assert [example.ids.tolist() for example in chosen] == [[5, 6, 7, 8], [0, 1]]
    assert (chosen.lengths.tolist(), chosen.tokens, chosen.learned_tokens) == ([4, 2], 6, 6)
