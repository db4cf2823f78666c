"""What is kept decoded for generation changes no result, keeps to its room, and is gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.model import experts as experts_module
from finetune.model import keep_decoded
from finetune.model.expert_layer import Factors
from finetune.model.experts import PackedExperts
from tests.model_kit import without_native_products
from tests.unit.test_model_expert_layer import (
    EXPERTS,
    HIDDEN,
    INNER,
    ONE_EXPERT,
    Layer,
    make_case,
    make_layer,
)

UP_BYTES, DOWN_BYTES = 4 * ONE_EXPERT, 4 * HIDDEN * INNER


def forward(layer: Layer, seed: int = 0) -> torch.Tensor:
    case = make_case(tokens=5, seed=seed)
    with torch.no_grad():
        out: torch.Tensor = layer(case.x.float(), case.indices, case.scores.float())
    return out


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products decode for themselves."""
    without_native_products(monkeypatch)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts each decoding was for."""
    counts: list[int] = []
    decode = PackedExperts._decode

    def counted(self: PackedExperts, name: str, first: int, last: int, *rest: Any) -> torch.Tensor:
        counts.append(last - first)
        return decode(self, name, first, last, *rest)

    monkeypatch.setattr(PackedExperts, "_decode", counted)
    return counts


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("room", [0, 2 * UP_BYTES + DOWN_BYTES, 1 << 30], ids=["none", "some", "all"])
def test_results_are_the_same_whatever_room_there_is(
    room: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "GROUP_WEIGHTS", group * ONE_EXPERT)
    layer = make_layer(torch.float32)
    expected = [forward(layer, seed) for seed in range(3)]
    with keep_decoded(layer, room):
        for _ in range(2):
            found = [forward(layer, seed) for seed in range(3)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_expert_is_decoded_once_where_there_is_room(decoded: list[int]) -> None:
    layer = make_layer(torch.float32)
    with keep_decoded(layer, 1 << 30):
        forward(layer)
        first = sum(decoded)
        forward(layer)
        assert sum(decoded) == first <= 2 * EXPERTS
    forward(layer)
    assert sum(decoded) > first, "nothing is kept afterwards"


def test_no_more_is_kept_than_there_is_room_for(decoded: list[int]) -> None:
    layer = make_layer(torch.float32)
    with keep_decoded(layer, UP_BYTES + DOWN_BYTES):
        forward(layer)
        first = sum(decoded)
        forward(layer)
    # At most one expert's weights, or two of the smaller kind, did not need decoding again.
    assert first - 2 <= sum(decoded) - first < first


def test_experts_without_a_token_are_not_decoded(decoded: list[int]) -> None:
    layer, case = make_layer(torch.float32), make_case(tokens=1)
    with torch.no_grad():
        layer(case.x.float(), case.indices, case.scores.float())
    assert sum(decoded) == 2 * case.indices.numel()


def test_a_single_adapters_factors_are_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Factors] = []
    ready = Factors.ready

    def counted(self: Factors, dtype: torch.dtype) -> Factors:
        made.append(self)
        return ready(self, dtype)

    monkeypatch.setattr(Factors, "ready", counted)
    layer = make_layer(torch.float32)
    with keep_decoded(layer):
        for _ in range(3):
            forward(layer)
    assert len(made) == 2, "one of each projection"
