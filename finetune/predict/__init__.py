"""What a run will take, told before it starts: memory by part, time, and what makes it fit where it does not.

shape.py     a model's sizes and how many weights each part has
workload.py  what a recipe computes at a time
machines.py  what GPUs can do, by their data sheets; here.py the machine at hand, measured by bench/rates.py
memory.py    peak memory from what is allocated; speed.py time from FLOPs and bytes
sample.py    how much data there is
advice.py    the smallest change that makes a recipe fit
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from finetune.errors import FinetuneError
from finetune.predict.advice import Change, smallest_change
from finetune.predict.here import free_host_memory, memory_here, this_machine
from finetune.predict.machines import Machine, gpu
from finetune.predict.memory import Memory, host_bytes, predict_memory
from finetune.predict.sample import Lengths, Sample
from finetune.predict.shape import RELEASED, Shape
from finetune.predict.speed import Speed, predict_speed
from finetune.predict.workload import Workload
from finetune.recipe import Recipe

__all__ = [
    "RELEASED", "Change", "Lengths", "Machine", "Memory", "Prediction", "Sample", "Shape", "Speed",
    "Workload", "gpu", "predict", "predict_memory", "predict_speed", "require_memory", "smallest_change",
    "this_machine",
]  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What a recipe takes on one machine. `steps` and `seconds` are None where its data is not here."""

    machine: Machine
    memory: Memory
    host_bytes: float
    speed: Speed
    steps: int | None
    seconds: float | None
    price: float | None
    change: Change | None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.machine.memory

    @property
    def shortage(self) -> str | None:
        """What is wrong and what to change, as a sentence, where it does not fit."""
        if self.fits:
            return None
        assert self.change is not None
        return said_shortage(self.memory.total, self.machine, self.change)

    @property
    def cost(self) -> float | None:
        """Of the whole training, in the currency of `price`, which is per hour."""
        return None if self.price is None or self.seconds is None else self.price * self.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        speed = self.speed
        return {
            "machine": asdict(self.machine),
            "fits": self.fits,
            "memory_bytes": self.memory.to_dict(),
            "host_memory_bytes": round(self.host_bytes),
            "tokens_per_second": round(speed.tokens_per_second, 1),
            "step_seconds": round(speed.step_seconds, 4),
            "step_parts": [asdict(part) for part in speed.parts],
            "limit": speed.limit,
            "mfu": round(speed.useful / speed.step_seconds / self.machine.sheet_matrix, 4),
            "steps": self.steps,
            "training_seconds": None if self.seconds is None else round(self.seconds, 1),
            "cost": None if self.cost is None else round(self.cost, 2),
            "smallest_change": asdict(self.change) if self.change else None,
        }


def predict(
    recipe: Recipe, shape: Shape, machine: Machine, sample: Sample | None = None, price: float | None = None
) -> Prediction:
    """Training of a recipe on one such machine; evaluation and export are not counted."""
    work = workload(recipe, sample)
    memory, speed = predict_memory(shape, work, machine), predict_speed(shape, work, machine)
    steps = _steps(recipe, work, sample)
    change = None
    if memory.total > machine.memory:
        change = smallest_change(recipe, lambda other: _need(other, shape, machine, sample), machine.memory)
    # The last pack of a step may not be full: time goes by the tokens in it.
    fill = sample.fill if sample else 1.0
    seconds = None if steps is None else steps * speed.step_seconds * fill
    on_host = host_bytes(shape, work) if machine.kind == "cuda" else 0.0
    return Prediction(machine, memory, on_host, speed, steps, seconds, price, change)


def workload(recipe: Recipe, sample: Sample | None) -> Workload:
    """A pass of the recipe over data like the sample."""
    return Workload.of(recipe, sample.lengths, sample.learned) if sample else Workload.of(recipe)


def require_memory(recipe: Recipe, shape: Shape, sample: Sample | None) -> None:
    """Raise FinetuneError where the memory that is free here is less than training takes at its peak."""
    machine, work = memory_here(), workload(recipe, sample)
    if machine.kind == "cuda" and host_bytes(shape, work) > free_host_memory():
        raise FinetuneError(
            f"training keeps {host_bytes(shape, work) / 1e9:.1f} GB in the host's memory, which has "
            f"{free_host_memory() / 1e9:.1f} GB free; train.force_memory=true tries it all the same"
        )
    need = predict_memory(shape, work, machine).total
    if need <= machine.memory:
        return
    change = smallest_change(recipe, lambda other: _need(other, shape, machine, sample), machine.memory)
    raise FinetuneError(said_shortage(need, machine, change))


def said_shortage(need: float, machine: Machine, change: Change) -> str:
    """What is wrong and what to change, in one sentence."""
    words = " ".join(change.overrides)
    if change.enough:
        advice = f"{words} would make it fit, with {change.bytes / 1e9:.1f} GB"
    elif words:
        advice = f"even {words} would take {change.bytes / 1e9:.1f} GB"
    else:
        advice = "no setting makes it smaller"
    return (
        f"training takes {need / 1e9:.1f} GB at its peak, and {machine.name} has "
        f"{machine.memory / 1e9:.1f} GB: {advice}; train.force_memory=true tries it all the same"
    )


def _need(recipe: Recipe, shape: Shape, machine: Machine, sample: Sample | None) -> float:
    return predict_memory(shape, workload(recipe, sample), machine).total


def _steps(recipe: Recipe, work: Workload, sample: Sample | None) -> int | None:
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    if sample is None:
        return None
    packs = math.ceil(sample.tokens / (work.tokens * sample.fill))
    return max(1, math.ceil(recipe.train.epochs * math.ceil(packs / work.passes)))
