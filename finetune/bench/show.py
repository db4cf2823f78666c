"""A benchmark's figures for people: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

ROUTINGS = ("natural", "balanced")
NOT_SIDES = ("against",)


def table(figures: dict[str, Any]) -> Table:
    """A line for each side and routing, the prediction above them."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("side")
    shown.add_column("routing")
    for column in ("tokens/s", "MFU", "memory", "speed", "memory", "loss apart", "gradient apart"):
        shown.add_column(column, justify="right")
    predicted = figures["predicted"]
    shown.add_row("finetune", "predicted", *_pace(predicted), style="dim")
    for routing in ROUTINGS:
        for side, result in figures.get(routing, {}).items():
            if side in NOT_SIDES:
                continue
            if "failed" in result:
                shown.add_row(side, routing, result["failed"])
                continue
            ratios = figures[routing]["against"].get(side)
            shown.add_row(side, routing, *_pace(result), *(_ratios(ratios) if ratios else []))
    return shown


def _pace(result: dict[str, Any]) -> list[str]:
    mfu = f"{result['mfu']:.1%}" if "mfu" in result else ""
    return [f"{result['tokens_per_second']:,.0f}", mfu, f"{result['memory_gb']:.2f} GB"]


def _ratios(ratios: dict[str, Any]) -> list[str]:
    apart = ratios["gradient_difference"]
    return [
        f"ours {ratios['speed_ratio']:.2f}x",
        f"ours {ratios['memory_ratio']:.2f}x",
        f"{ratios['largest_loss_difference']:.1e}",
        "" if apart is None else f"{apart:.1e}",
    ]


def plot(figures: dict[str, Any], file: Path) -> None:
    """Bars of tokens/s and of memory, a line at what was predicted for finetune; needs matplotlib."""
    from matplotlib.figure import Figure

    bars = {
        f"{side}\n{routing}": result
        for routing in ROUTINGS
        for side, result in figures.get(routing, {}).items()
        if side not in NOT_SIDES and "failed" not in result
    }
    page = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, unit) in zip(
        page.subplots(1, 2), (("tokens_per_second", "tokens/s"), ("memory_gb", "memory, GB")), strict=True
    ):
        colours = ["#2a6f97" if name.startswith("finetune") else "#b0b7bf" for name in bars]
        axes.bar(list(bars), [result[key] for result in bars.values()], color=colours)
        axes.axhline(
            figures["predicted"][key], color="#d1495b", linestyle="--", label="predicted for finetune"
        )
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    page.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    page.suptitle(
        f"{figures['tokens']:,} tokens a step in documents of {figures['document']:,}, {figures['dtype']}, "
        f"rank {figures['rank']}"
    )
    page.savefig(file, format="svg", metadata={"Date": None})
