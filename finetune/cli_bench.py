"""`finetune bench`: how fast and how large training is here, beside another stack and the prediction."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finetune.cli_common import Debug, Json, Overrides, command
from finetune.errors import FinetuneError


def bench(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    overrides: Overrides = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another stack that trains the same, trl or unsloth; may be given twice."),
    ] = None,
    routing: Annotated[
        Literal["both", "natural", "balanced"],
        typer.Option(help="As the random router has it, the same number of tokens to each expert, or both."),
    ] = "both",
    steps: Annotated[int, typer.Option(min=1, help="Steps that count; their median is told.")] = 20,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep figures and conditions here, a plot beside.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train random weights of the recipe's shape on random tokens, and tell speed, memory and agreement.

    The recipe's data is not needed. Each side runs in a process of its own, one after the other.
    """
    with command(as_json, debug, libraries=True) as output:
        if out is not None and out.suffix != ".json":
            raise FinetuneError(f"--out {out}: the figures are JSON, so the file's name ends in .json")

        from rich.console import Console

        from finetune.bench.compare import bench as measure
        from finetune.bench.show import table
        from finetune.recipe import load_recipe

        console = Console(stderr=as_json, highlight=False)
        figures = measure(
            load_recipe(recipe, overrides or ()),
            against or (),
            steps=steps,
            routings=("natural", "balanced") if routing == "both" else (routing,),
            tell=console.print,
        )
        if out is not None:
            words = ["finetune", "bench", str(recipe), *(overrides or ()), "--steps", str(steps)]
            words += [word for name in against or () for word in ("--against", name)]
            _keep(out, shlex.join([*words, "--routing", routing]), figures)
        if as_json:
            output.json(figures)
        else:
            console.print(table(figures))


def _keep(out: Path, words: str, figures: dict[str, Any]) -> None:
    from finetune.bench.conditions import record
    from finetune.bench.show import plot

    record(out.parent, out.stem, words, figures)
    plot(figures, out.with_suffix(".svg"))
