"""How time and memory of a training step grow with context, experts and rank: measured, and predicted beyond.

    python -m tests.measure.growth [--only context|experts|rank] [--steps 3] [--again] [--record]

Random weights on this machine's CPU, bfloat16, one document a step. What takes this machine too long is
predicted, and marked so in the figures and in the plots. With --record the figures go to
runs/reference/growth.json and the plots to growth_<what>.svg beside it; --only adds
to what is there, and --again measures nothing but predicts anew.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from finetune.predict import Machine, Shape, Workload, predict_memory, predict_speed, this_machine
from tests.measure.conditions import REFERENCE, record
from tests.measure.random_size import config_of, measure, recipe_of

COMMAND = "python -m tests.measure.growth --record"
# Narrow, so that a context of 8k is a matter of seconds; half of the layers see all of it.
NARROW = {"hidden": 512, "intermediate": 512, "layers": 2, "experts": 8, "heads": 8, "kv_heads": 2}
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
LONGEST = 8192  # beyond, a step takes minutes here
EXPERTS = [8, 16, 32, 64, 128]
RANKS = [8, 16, 32, 64]
TOKENS, RANK = 1024, 8


def sizes_of(what: str, value: int) -> tuple[dict[str, int], int, int]:
    """Sizes, tokens and rank of one point of a curve."""
    if what == "context":
        return NARROW, value, RANK
    return (NARROW | {"experts": value}, TOKENS, RANK) if what == "experts" else (NARROW, TOKENS, value)


def point(what: str, value: int, steps: int) -> dict[str, Any]:
    """Seconds and memory of a step as measured; nothing where it takes this machine too long."""
    sizes, tokens, rank = sizes_of(what, value)
    if what == "context" and value > LONGEST:
        return {}
    figures = measure(recipe_of(tokens, rank, "bfloat16"), config_of(**sizes), steps=steps)
    ours = figures["natural"]["finetune"]
    return {
        "measured": {
            "step_seconds": tokens / ours["tokens_per_second"],
            "memory_gb": ours["peak_gb"],
            "all_step_seconds": ours["step_seconds"],
        }
    }


def predicted(what: str, value: int, machine: Machine) -> dict[str, float]:
    """The same as predicted."""
    sizes, tokens, rank = sizes_of(what, value)
    shape, work = Shape.of(config_of(**sizes)), Workload.of(recipe_of(tokens, rank, "bfloat16"))
    speed, memory = predict_speed(shape, work, machine), predict_memory(shape, work, machine)
    return {"step_seconds": speed.step_seconds, "memory_gb": memory.total / 1e9}


def plot(what: str, curve: dict[str, Any]) -> None:
    """Time and memory against the one thing that grows; measured as points, predicted as a line."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 3.6), layout="constrained")
    keys = (("step_seconds", "seconds a step"), ("memory_gb", "peak memory, GB"))
    for axes, (key, unit) in zip(page.subplots(1, 2), keys, strict=True):
        values = [int(value) for value in curve]
        axes.plot(
            values, [curve[v]["predicted"][key] for v in curve], "--", color="#d1495b", label="predicted"
        )
        found = [(int(v), curve[v]["measured"][key]) for v in curve if "measured" in curve[v]]
        axes.plot(*zip(*found, strict=True), "o", color="#2a6f97", label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if what == "context" else "linear")
        if what != "context":
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.set_xticks(values, [f"{v // 1024}k" if v >= 1024 else str(v) for v in values])
        axes.set_xlabel({"context": "context, tokens", "experts": "experts", "rank": "rank"}[what])
        axes.set_ylabel(unit)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    page.savefig(REFERENCE / f"growth_{what}.svg", format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["context", "experts", "rank"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure nothing, predict anew")
    parser.add_argument("--record", action="store_true", help="keep figures and plots under runs/reference/")
    options = parser.parse_args()
    file = REFERENCE / "growth.json"
    figures: dict[str, Any] = json.loads(file.read_text())["figures"] if file.is_file() else {}
    machine = this_machine("bf16")
    for what, values in (("context", CONTEXTS), ("experts", EXPERTS), ("rank", RANKS)):
        if options.only in (None, what):
            if not options.again:
                figures[what] = {}
            curve = figures[what]
            for value in values:
                found = curve.get(str(value), {}) if options.again else point(what, value, options.steps)
                curve[str(value)] = {**found, "predicted": predicted(what, value, machine)}
                print(what, value, json.dumps(curve[str(value)]), flush=True)
            if options.record:
                plot(what, curve)
    if options.record:
        record("growth", COMMAND, {"sizes": NARROW, "tokens": TOKENS, "rank": RANK, **figures})


if __name__ == "__main__":
    main()
