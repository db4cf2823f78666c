"""How `finetune verify` looks on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from finetune.export.verify import Verdict


def show_verdict(verdict: Verdict, console: Console) -> None:
    """The figures beside what is allowed, then the outcome."""
    table = Table(box=None, pad_edge=False)
    for heading in (f"{verdict.format}, by {verdict.judge}", "found", "allowed"):
        table.add_column(heading, justify="left" if heading.startswith(verdict.format) else "right")
    typical, most = verdict.typical_difference, verdict.max_allowed
    table.add_row(
        "largest difference of logits", f"{verdict.max_difference:.2g}", f"{most:.2g}" if most else ""
    )
    table.add_row("at the typical position", f"{typical:.2g}", f"{verdict.typical_allowed:.2g}")
    table.add_row("mean difference", f"{verdict.mean_difference:.2g}", "")
    if verdict.effect is not None:
        table.add_row("mean effect of the adapter", f"{verdict.effect:.2g}", "")
    table.add_row("greedy tokens equal", f"{verdict.greedy_equal} of {verdict.greedy}", "")
    console.print(table)
    console.print(f"asked about {verdict.prompts}: {verdict.tokens} positions", markup=False)
    if verdict.note:
        console.print(verdict.note, markup=False)
    if verdict.passed:
        console.print("this is the model that it was made from", style="green")
    else:
        console.print("this is NOT the model that it was made from", style="red")
