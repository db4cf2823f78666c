"""Time on a processor: units are counted in the right things, and their prices come out of measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.bench.pricing import TYPICAL, TYPICAL_OF_ANY, fit_prices
from finetune.bench.probes import LAYERS, sizes_and_work
from finetune.predict import Machine, Shape, Workload, gpu, predict_memory, predict_speed
from finetune.predict.memory import ONEDNN_PROGRAM, ONEDNN_PROGRAMS
from finetune.predict.units import LIMITS, PARTS, head_units, layers_units, scored_keys

SHAPE = Shape(
    hidden=1024, intermediate=512, layers=4, full_layers=2, experts=8, top_k=2, heads=16, kv_heads=4,
    head_dim=64, vocab=4096, window=128,
)  # fmt: skip
WORK = Workload(2048, 1, 8, ["attention", "experts"], "bf16", True, "adamw", 1024)


def processor(**prices: float) -> Machine:
    """One on which a unit costs nothing unless given."""
    every = dict.fromkeys(PARTS, 0.0) | {name.replace("_", " "): price for name, price in prices.items()}
    return Machine("p", "cpu", 1e10, {}, 1e30, 0.0, 0.0, prices={"bf16": every})


def test_every_unit_has_a_part_and_every_part_a_limit() -> None:
    counted = layers_units(SHAPE, WORK) | head_units(10, SHAPE.hidden, SHAPE.vocab)
    assert set(counted) == set(PARTS) and set(PARTS.values()) == set(LIMITS)


def test_a_step_costs_what_its_units_cost() -> None:
    one = predict_speed(SHAPE, WORK, processor(experts=1e-3)).step_seconds
    assert one == pytest.approx(1e-3 * SHAPE.layers * SHAPE.experts)
    both = predict_speed(SHAPE, WORK, processor(experts=1e-3, products=1e-12)).step_seconds
    assert both > one
    assert predict_speed(SHAPE, replace(WORK, passes=3), processor(experts=1e-3)).step_seconds == (
        pytest.approx(3 * one)
    )


def layer_units(probe: tuple[int, ...]) -> dict[str, float]:
    sizes, work = sizes_and_work(probe, "bf16")
    return layers_units(Shape.of(sizes), work)


def seconds_of(prices: dict[str, float], units: list[dict[str, float]]) -> list[float]:
    return [sum(price * each[name] for name, price in prices.items()) for each in units]


@given(st.lists(st.floats(0.7, 1.4), min_size=12, max_size=12), st.floats(0.05, 20.0))
def test_prices_explain_probes_of_faster_and_slower_machines(factors: list[float], machine: float) -> None:
    units = [layer_units(probe) for probe in LAYERS]
    typical = TYPICAL["bf16"] | TYPICAL_OF_ANY
    prices = {name: machine * factor * typical[name] for name, factor in zip(units[0], factors, strict=False)}
    seconds = seconds_of(prices, units)
    found = fit_prices(units, seconds, "bf16")
    assert seconds_of(found, units) == pytest.approx(seconds, rel=0.1)


def test_a_unit_that_no_probe_tells_apart_keeps_its_typical_price() -> None:
    typical = TYPICAL["bf16"] | TYPICAL_OF_ANY
    units = [{"products": n / typical["products"], "passes": 0.0} for n in (1.0, 2.0, 4.0)]
    found = fit_prices(units, [1.0, 2.0, 4.0], "bf16")
    assert found == pytest.approx({name: typical[name] for name in units[0]})


def test_there_are_more_probes_than_prices() -> None:
    assert len(LAYERS) > len(layers_units(SHAPE, WORK))


def test_packs_that_differ_fill_the_cache_of_programs_on_a_processor_alone() -> None:
    for machine, more in ((processor(), ONEDNN_PROGRAM * ONEDNN_PROGRAMS), (gpu("h200"), 0.0)):
        alike, varied = (predict_memory(SHAPE, replace(WORK, varied=v), machine) for v in (False, True))
        assert varied.libraries - alike.libraries <= more
        assert (varied.libraries > alike.libraries) == bool(more)


def test_kept_attention_is_less_work_and_more_memory() -> None:
    machine, kept = gpu("h200"), replace(WORK, keep_attention=1)
    more = predict_memory(SHAPE, kept, machine).activations - predict_memory(SHAPE, WORK, machine).activations
    assert more == pytest.approx(2048 * (SHAPE.query * 2 + 4 * SHAPE.heads))
    seconds = [predict_speed(SHAPE, work, machine).parts[1].seconds for work in (WORK, kept)]
    assert seconds[1] < seconds[0]
    # No more layers can keep it than there are that attend to everything.
    assert scored_keys(SHAPE, replace(WORK, keep_attention=9), on_cpu=True) == scored_keys(
        SHAPE, replace(WORK, keep_attention=2), on_cpu=True
    )
