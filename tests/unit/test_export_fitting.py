"""A layer of a merge, fitted to the streams that pass through it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.export import fitting
from finetune.export.fitting import Change, fit_layer, next_excess
from finetune.export.layerwise import Network, Passage
from finetune.export.passages import Passages
from finetune.export.refit import INWARD, OUTWARD, refit_attention
from finetune.export.shortfall import Shortfall
from finetune.export.streams import VERSIONS, Streams, Version, Walk
from finetune.export.words import score_words
from finetune.model.expert_layer import Factors
from tests.checkpoints import write_random_checkpoint

EXPERTS, HIDDEN, INNER, RANK = 5, 96, 64, 2


@pytest.fixture
def network(tmp_path: Path) -> Network:
    shape = {"hidden": HIDDEN, "layers": 1, "experts": EXPERTS, "top_k": 2, "intermediate": INNER}
    return Network(write_random_checkpoint(tmp_path / "base", **shape), torch.device("cpu"))  # type: ignore[arg-type]


def passage(seed: int, length: int = 400) -> Passage:
    torch.manual_seed(seed)
    ids = torch.randint(0, 200, (length,))
    return Passage(ids, ids.roll(-1), torch.arange(length) % 50)


def walk_of(network: Network) -> Walk:
    return Walk.begin(network, Passages([passage(0), passage(1)], [passage(2)], "random words"))


def merged_attention(network: Network, size: float) -> dict[str, Tensor]:
    torch.manual_seed(3)
    exact = {}
    for name in (*INWARD, OUTWARD):
        weights = network.checkpoint.read(f"model.layers.0.{name}").float()
        exact[name] = weights + size * torch.randn_like(weights)
    return exact


def small_factors() -> dict[str, Factors]:
    torch.manual_seed(4)

    def factors(inputs: int, outputs: int) -> Factors:
        a = torch.randn(EXPERTS, RANK, inputs) * inputs**-0.5
        return Factors(a, 0.02 * torch.randn(EXPERTS, outputs, RANK))

    return {"gate_up_proj": factors(HIDDEN, 2 * INNER), "down_proj": factors(INNER, HIDDEN)}


@torch.inference_mode()
def test_refitted_attention_mends_an_export_that_came_in_off(network: Network) -> None:
    streams, exact = walk_of(network).calibration, merged_attention(network, 0.01)
    off = torch.eye(HIDDEN) + 0.1 * torch.randn(HIDDEN, HIDDEN) * HIDDEN**-0.5
    streams.at["export"] = [state @ off for state in streams.at["export"]]
    layer = network.layer(0)
    layer.replace(exact)
    wanted = torch.cat(streams.attended(layer, "tuned"))
    before = (torch.cat(streams.attended(layer, "export")) - wanted).square().mean()
    found, export = refit_attention(layer, exact, streams, wanted, torch.ones(len(wanted)), torch.bfloat16)
    assert torch.equal(torch.cat(export), torch.cat(streams.attended(layer, "export")))
    after = (torch.cat(export) - wanted).square().mean()
    assert after < 0.5 * before
    assert all(torch.equal(weights, weights.bfloat16().float()) for weights in found.values())


@torch.inference_mode()
def test_attention_that_came_in_right_stays_as_merged(network: Network) -> None:
    streams, exact = walk_of(network).calibration, merged_attention(network, 0.01)
    layer = network.layer(0)
    layer.replace(exact)
    wanted = torch.cat(streams.attended(layer, "tuned"))
    found, _ = refit_attention(layer, exact, streams, wanted, torch.ones(len(wanted)), torch.float32)
    assert all((found[name] - exact[name]).abs().max() < 1e-5 for name in exact)


@torch.inference_mode()
def test_weights_that_the_adapter_leaves_are_not_fitted(network: Network) -> None:
    streams = walk_of(network).calibration
    exact = {OUTWARD: merged_attention(network, 0.01)[OUTWARD]}
    layer = network.layer(0)
    layer.replace(exact)
    wanted = torch.cat(streams.attended(layer, "tuned"))
    found, _ = refit_attention(layer, exact, streams, wanted, torch.ones(len(wanted)), torch.bfloat16)
    assert list(found) == [OUTWARD]


def share_learned(streams: Streams) -> float:
    base = streams.all("base")
    wanted, made = streams.all("tuned") - base, streams.all("export") - base
    return float((wanted * made).sum() / wanted.square().sum())


@torch.inference_mode()
def test_rounds_at_the_last_layer_make_up_for_what_rounding_swallows(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for rounds in (1, fitting.ROUNDS):
        monkeypatch.setattr(fitting, "ROUNDS", rounds)
        walk = walk_of(network)
        fit_layer(network, 0, Change({}, small_factors()), walk, sweeps=8)
        shares.append(abs(1 - share_learned(walk.calibration)))
    assert shares[1] < 0.8 * shares[0]


def loss(network: Network, streams: Streams, version: Version) -> float:
    targets, learned = targets_of(streams), streams.learned()
    return float(score_words(network, streams.all(version)[learned], targets[learned]).losses.mean())


def targets_of(streams: Streams) -> Tensor:
    return torch.cat([passage.targets for passage in streams.passages])


def share_of_gain_missing(network: Network, streams: Streams) -> float:
    base, tuned, export = (loss(network, streams, version) for version in VERSIONS)
    return (export - tuned) / (base - tuned)


def learned_words(network: Network) -> list[Passage]:
    """Passages whose targets are what the tuned model says where the base says something else."""
    walk, layer = walk_of(network), network.layer(0)
    streams, head = walk.calibration, torch.cat(list(network.head()))
    streams.step(layer, "base", {})
    streams.step(layer, "tuned", small_factors())
    passages = []
    for passage, base, tuned in zip(streams.passages, streams.at["base"], streams.at["tuned"], strict=True):
        said = [(network.final_norm(state) @ head.mT).argmax(1) for state in (base, tuned)]
        targets = torch.where(said[0] == said[1], -100, said[1])
        passages.append(Passage(passage.ids, targets, passage.positions))
    return passages


@torch.inference_mode()
def test_rounds_at_the_last_layer_make_up_for_the_gain_that_rounding_swallows(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, missing = learned_words(network), []
    for rounds in (1, fitting.ROUNDS):
        monkeypatch.setattr(fitting, "ROUNDS", rounds)
        walk = Walk.begin(network, Passages(learned, [passage(2)], "words that the tuned model says"))
        fit_layer(network, 0, Change({}, small_factors()), walk, sweeps=8)
        missing.append(abs(share_of_gain_missing(network, walk.calibration)))
    assert missing[1] < 0.5 * missing[0]


@torch.inference_mode()
def test_without_a_learned_token_shares_of_the_change_count(network: Network) -> None:
    walk = walk_of(network)
    unlearned = [
        Passage(p.ids, torch.full_like(p.targets, -100), p.positions) for p in walk.calibration.passages
    ]
    streams = Streams(unlearned, walk.calibration.at)
    streams.step(network.layer(0), "tuned", small_factors())
    for version, missing in (("base", 1.0), ("tuned", 0.0)):
        streams.at["export"] = streams.at[version]  # type: ignore[index]
        shortfall = Shortfall(network, streams, torch.ones(len(streams.all("base"))))
        assert shortfall.missing() == pytest.approx(missing, abs=1e-5)


def test_an_aim_goes_further_by_what_arrived_of_the_last_one() -> None:
    assert next_excess([(0.0, 0.02)]) == 0.02
    assert next_excess([(0.0, 0.02), (0.02, 0.01)]) == pytest.approx(0.04)
    assert next_excess([(0.0, 0.02), (0.02, 0.02)]) == pytest.approx(0.02 + 0.02 / fitting.LEAST_RESPONSE)
    assert next_excess([(0.0, -0.1)]) == 0.0
    assert next_excess([(0.0, 0.9)]) == fitting.LARGEST_EXCESS


@torch.inference_mode()
def test_an_adapter_without_a_change_leaves_the_layer(network: Network) -> None:
    walk = walk_of(network)
    fitted = fit_layer(network, 0, Change({}, {}), walk, sweeps=8)
    assert fitted.changed == 0 and not fitted.dense
    for streams in walk:
        assert torch.equal(streams.all("base"), streams.all("export"))
        assert torch.equal(streams.all("base"), streams.all("tuned"))


def test_a_walk_goes_on_from_its_states(network: Network) -> None:
    walk, other = walk_of(network), walk_of(network)
    with torch.inference_mode():
        fit_layer(network, 0, Change({}, small_factors()), walk, sweeps=1)
    other.resume(walk.states())
    for streams, resumed in zip(walk, other, strict=True):
        for version in ("base", "tuned", "export"):
            assert torch.equal(streams.all(version), resumed.all(version))
