"""Both sides of a benchmark, one after the other, and how far they agree."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.bench.random_weights import release_config, write_random_base
from finetune.bench.work import Measured, Routing, Side, Work
from finetune.errors import FinetuneError
from finetune.model import add_lora, load_base, resolve, save_adapter
from finetune.model.checkpoint import inspect_checkpoint
from finetune.model.cpu_settings import ask_for_large_pages
from finetune.predict import RELEASED, Machine, Shape, Workload, predict_memory, predict_speed, this_machine
from finetune.predict.here import CPU_IMPORTS
from finetune.predict.speed import useful_flops
from finetune.recipe import Recipe

Opponent = Literal["trl", "unsloth"]
# lora_B begins as zeros, which leaves lora_A without a gradient to compare: these are of a trained size.
ADAPTER_STD = 0.02
# Steps before the ones that count: buffers grow, and the moments are made.
WARM_UP = 2


@dataclass(frozen=True)
class Result:
    """Figures of one side under one routing; `failed` says why there are none."""

    side: Side
    routing: Routing
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    memory_gb: float = 0.0
    measured: Measured | None = None
    failed: str | None = None


def bench(
    recipe: Recipe, against: Sequence[str] = (), *, steps: int = 20,
    routings: Sequence[Routing] = ("natural", "balanced"), config: dict[str, Any] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Train random weights of the recipe's shape with finetune and each opponent; returns the figures.

    Of the recipe count base, lora, dtype, optimizer, checkpointing, tokens_per_pass and max_tokens, which is
    the length of the documents; a step is one pass. `config`: a config.json to take the sizes from instead of
    the base's. `tell` hears what is going on.

    Raises:
        FinetuneError: an opponent is not installed, the base's sizes are not known, or the disk is too small.
    """
    opponents = [_opponent(name) for name in against]
    ask_for_large_pages()  # for both sides, whose processes inherit it
    config = config or _config(recipe)
    shape, machine = Shape.of(config), this_machine(recipe.model.computes_in)
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as folder:
        place = Path(folder)
        _require_room(place, shape)
        work = _work(recipe, place, steps)
        tell(f"random weights of {recipe.model.base}'s shape, {shape.expert_weights / 1e6:,.0f} M in experts")
        _write_start(recipe, config, work)
        figures = _conditions_of(recipe, shape, work, machine)
        for routing in routings:
            sides: dict[Side, Result] = {}
            order: list[Side] = ["finetune", *opponents]
            for side in order:
                sides[side] = _run(side, replace(work, routing=routing), place, shape, machine)
                tell(said(sides[side]))
            figures[routing] = {name: _result_dict(result) for name, result in sides.items()}
            figures[routing]["against"] = {
                opponent: _compare(sides["finetune"], sides[opponent], place)
                for opponent in opponents
                if sides["finetune"].measured and sides[opponent].measured
            }
    return figures


def _opponent(name: str) -> Opponent:
    known: dict[str, Opponent] = {"trl": "trl", "unsloth": "unsloth"}
    if name not in known:
        raise FinetuneError(f"--against {name}: known are {' and '.join(known)}")
    if find_spec(name) is None:
        raise FinetuneError(f"--against {name}: the package {name} is not installed here")
    return known[name]


def said(result: Result) -> str:
    """One line about a result."""
    if result.failed:
        return f"{result.side}, {result.routing} routing: {result.failed}"
    return (
        f"{result.side}, {result.routing} routing: {result.tokens_per_second:,.0f} tokens/s, "
        f"{result.memory_gb:.2f} GB"
    )


def _config(recipe: Recipe) -> dict[str, Any]:
    name = recipe.model.base
    if name in RELEASED and not Path(name).exists():
        shape = RELEASED[name]
        return release_config(
            hidden=shape.hidden, intermediate=shape.intermediate, layers=shape.layers, experts=shape.experts,
            top_k=shape.top_k, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            vocab=shape.vocab, sliding_window=shape.window,
        )  # fmt: skip
    return inspect_checkpoint(resolve(name).base).config


def _require_room(place: Path, shape: Shape) -> None:
    need, free = 17 / 32 * shape.expert_weights + 2 * shape.dense_weights, shutil.disk_usage(place).free
    if need > free:
        sentence = f"the random weights take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of disk are free"
        raise FinetuneError(sentence, at=str(place.parent))


def _work(recipe: Recipe, place: Path, steps: int) -> Work:
    tokens = recipe.tokens_per_pass
    return Work(
        checkpoint=str(place / "base"),
        adapter=str(place / "adapter"),
        rank=recipe.lora.rank,
        targets=list(recipe.lora.targets),
        dtype="float32" if recipe.model.dense == "float32" else "bfloat16",
        tokens=tokens,
        document=min(tokens, recipe.data.max_tokens),
        steps=steps,
        warm_up=WARM_UP,
        routing="natural",
        checkpointing=recipe.train.gradient_checkpointing,
        optimizer=recipe.train.optimizer,
    )


def _write_start(recipe: Recipe, config: dict[str, Any], work: Work) -> None:
    """The checkpoint and the adapter that both sides begin with."""
    checkpoint, lora = Path(work.checkpoint), recipe.lora
    write_random_base(checkpoint, config)
    base = load_base(checkpoint, dtype=torch.bfloat16, device="cpu")
    torch.manual_seed(0)
    model = add_lora(base, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=ADAPTER_STD)
    save_adapter(model, Path(work.adapter), base=checkpoint)


def _conditions_of(recipe: Recipe, shape: Shape, work: Work, machine: Machine) -> dict[str, Any]:
    """What both sides are given, and what was predicted for ours."""
    load = replace(Workload.of(recipe), passes=1, document=work.document, learned=1.0)
    memory, speed = predict_memory(shape, load, machine), predict_speed(shape, load, machine)
    given = {
        key: value for key, value in asdict(work).items() if key not in ("checkpoint", "adapter", "routing")
    }
    return {
        "shape": asdict(shape),
        **given,
        "loss": "TRL's fused head, on both sides",
        "attention": "finetune's over packed documents with trl, its own with unsloth",
        "machine": asdict(machine),
        "predicted": {
            "tokens_per_second": round(speed.tokens_per_second, 1),
            "memory_gb": round((memory.total - _left_out(machine)) / 1e9, 4),
            "memory_bytes": memory.to_dict(),
            "step_parts": [asdict(part) for part in speed.parts],
        },
    }


def _left_out(machine: Machine) -> float:
    """Bytes that are not in a side's memory: on a GPU all but what torch allocates, on a CPU the imports."""
    return machine.libraries if machine.kind == "cuda" else CPU_IMPORTS


def _run(side: Side, work: Work, place: Path, shape: Shape, machine: Machine) -> Result:
    """A side in a process of its own."""
    file, result = place / "work.json", place / f"{side}.json"
    work.write(file)
    gradients = place / f"{side}.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "finetune.bench.side", side, str(file), str(result), str(gradients)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        killed = "ended from outside, most likely for lack of memory"
        return Result(side, work.routing, failed=killed if done.returncode < 0 else last)
    measured = Measured(**json.loads(result.read_text()))
    load = Workload(
        work.tokens, 1, work.rank, work.targets, "float32" if work.dtype == "float32" else "bf16",
        work.checkpointing, work.optimizer, work.document,
    )  # fmt: skip
    pace = work.tokens / statistics.median(measured.step_seconds)
    mfu = pace * useful_flops(shape, load) / machine.sheet_matrix
    return Result(side, work.routing, pace, mfu, measured.peak_gb - measured.libraries_gb, measured)


def _result_dict(result: Result) -> dict[str, Any]:
    if result.measured is None:
        return {"failed": result.failed}
    figures = {
        "tokens_per_second": round(result.tokens_per_second, 1),
        "mfu": round(result.mfu, 4),
        "memory_gb": round(result.memory_gb, 4),
    }
    return figures | result.measured.to_dict()


def _compare(ours: Result, theirs: Result, place: Path) -> dict[str, Any]:
    """Ratios, and how far losses and first gradients agree."""
    assert ours.measured and theirs.measured
    pairs = zip(ours.measured.losses, theirs.measured.losses, strict=True)
    gradients = [load_file(place / f"{result.side}.safetensors") for result in (ours, theirs)]
    return {
        "speed_ratio": round(ours.tokens_per_second / theirs.tokens_per_second, 3),
        "memory_ratio": round(ours.memory_gb / theirs.memory_gb, 3),
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        **gradient_agreement(*gradients),
    }


def gradient_agreement(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float | None]:
    """Cosine and relative difference (L2) of all gradients as one vector; None where names differ."""
    if ours.keys() != theirs.keys():
        return {"gradient_cosine": None, "gradient_difference": None}
    product = ours_square = theirs_square = apart = 0.0
    for name, mine in ours.items():
        a, b = mine.double(), theirs[name].double()
        product += float((a * b).sum())
        ours_square += float(a.square().sum())
        theirs_square += float(b.square().sum())
        apart += float((a - b).square().sum())
    return {
        "gradient_cosine": product / (ours_square * theirs_square) ** 0.5,
        "gradient_difference": (apart / theirs_square) ** 0.5,
    }
