"""How `finetune check`, `runs` and `doctor` look on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from finetune.check import CheckReport, FoundBase, FoundRows
from finetune.cli_common import said_bytes
from finetune.cli_doctor import Diagnosis
from finetune.predict import Prediction
from finetune.recipe import dump_recipe
from finetune.rundir import RunDir


def show_check(report: CheckReport, console: Console) -> None:
    """The resolved recipe, then what was found of its base and data."""
    console.print(Syntax(dump_recipe(report.recipe).rstrip(), "yaml", background_color="default"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("base", report.base.where, _said_base(report.base))
    for found in report.data:
        table.add_row(found.key, _from_here(found.where), _said_rows(found))
    console.print()
    console.print(table)
    if report.prediction:
        show_prediction(report.prediction, console)
    elif report.unpredicted:
        console.print(f"\nno prediction: {report.unpredicted}")


def show_prediction(found: Prediction, console: Console) -> None:
    """Memory by part, speed, time and cost; of a GPU they are figures of a data sheet, not of a run."""
    memory, machine, speed = found.memory, found.machine, found.speed
    console.print(f"\npredicted for {machine.name}", style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, said in _MEMORY_PARTS.items():
        if size := getattr(memory, name):
            table.add_row(name, said_bytes(size), said)
    room = f"of {said_bytes(machine.memory)}, at the {memory.when}"
    style = "green" if found.fits else "red"
    table.add_row("peak memory", said_bytes(memory.total), room, style=style)
    console.print(table)
    if found.host_bytes:
        console.print(f"host memory: {said_bytes(found.host_bytes)} more, for what is not on the GPU")
    share = max(part.seconds for part in speed.parts) / speed.step_seconds
    most = max(speed.parts, key=lambda part: part.seconds).name
    console.print(
        f"speed: {speed.tokens_per_second:,.0f} tokens/s, {speed.step_seconds:.2f} s a step of "
        f"{speed.tokens:,} tokens; limited by {speed.limit} ({most}: {share:.0%})"
    )
    if found.seconds is not None:
        cost = "" if found.cost is None else f", costing {_said_cost(found.cost)} at {found.price:g} an hour"
        console.print(f"training: {found.steps:,} steps in {said_seconds(found.seconds)}{cost}")


def _said_cost(cost: float) -> str:
    return f"{cost:,.2f}" if cost >= 0.01 or not cost else "less than 0.01"


_MEMORY_PARTS = {
    "experts": "as stored, with biases",
    "dense": "attention, router, embeddings, head",
    "adapter": "trained weights in float32",
    "gradients": "of the adapter",
    "optimizer": "moments of the adapter",
    "activations": "kept for backward, and at work in one layer",
    "scratch": "what a group of experts works on",
    "logits": "tiles of the output head",
    "libraries": "before a model is loaded",
    "allocator": "freed, but not given back",
}


def said_seconds(seconds: float) -> str:
    """Time as people say it: 40 s, 12 min, 3.2 h, 4.0 days."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _from_here(path: str) -> str:
    """A path as one would type it in the current folder."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _said_base(base: FoundBase) -> str:
    if base.path is None or base.weights is None or base.bytes is None:
        return "not on this machine yet: the run downloads it from the hub"
    size = f"{base.weights / 1e9:.1f} billion" if base.weights > 1e9 else f"{base.weights / 1e6:.1f} million"
    shape = f"{base.layers} layers of {base.experts} experts"
    return f"{base.kind}, {shape}, {size} weights in {said_bytes(base.bytes)}"


def _said_rows(found: FoundRows) -> str:
    if found.rows is None or found.bytes is None:
        return "not looked at: the run fetches it"
    said = f"{found.rows:,} rows, {said_bytes(found.bytes)}"
    if found.more:
        said = f"more than {found.rows:,} rows (these were looked at), {said_bytes(found.bytes)}"
    return f"{said}, {found.bad:,} bad; the first: {found.first_bad}" if found.bad else said


def show_runs(runs: list[RunDir], console: Console) -> None:
    """One line a run, the newest last."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "base", "steps", "loss", "held-out loss"):
        table.add_column(column, justify="left" if column in ("run", "status", "base") else "right")
    for run in runs:
        info, last = run.info(), run.last_metrics()
        figures = [f"{last[key]:.4f}" if key in last else "" for key in ("loss", "eval_loss")]
        base = str(info.get("base", {}).get("where", ""))
        table.add_row(run.path.name, str(info.get("status")), base, str(last.get("step", "")), *figures)
    console.print(table)


def show_doctor(found: Diagnosis, console: Console) -> None:
    """Machine, packages, and what is wrong with them."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("python", found.python)
    table.add_row("machine", f"{found.system}, {found.cpus} cores, {said_bytes(found.memory)} of memory")
    for gpu in found.gpus:
        free, total = said_bytes(gpu["free"]), said_bytes(gpu["memory"])
        table.add_row("GPU", f"{gpu['name']}, {free} free of {total}, compute capability {gpu['capability']}")
    if not found.gpus:
        table.add_row("GPU", "none: good for nano and for trying things out")
    slow = "decoded first: no AVX-512, or no C compiler (cc)"
    table.add_row("experts on CPU", f"native in {' and '.join(found.native)}" if found.native else slow)
    table.add_row("disk", f"{said_bytes(found.disk_free)} free here")
    for package in found.packages:
        table.add_row(package.name, package.installed or "missing", style=None if package.fits else "red")
    console.print(table)
    console.print("\n".join(found.problems) or "all is well", style="red" if found.problems else "green")
