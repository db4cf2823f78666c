"""The `finetune` command. Stages are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from finetune.cli_common import Debug, Json, Overrides, command

app = typer.Typer(
    name="finetune",
    help="Customise gpt-oss on the weights as released.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]


def main() -> None:
    """What the installed command calls."""
    app()


@app.command()
def new(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="A folder to make.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a starter recipe, and a place for data with two rows in it."""
    with command(as_json, debug) as output:
        from finetune.cli_new import write_starter

        written = write_starter(name)
        if as_json:
            output.json({"written": [str(path) for path in written]})
        else:
            lines = [f"wrote {path}" for path in written] + [f"next: finetune check {written[0]}"]
            typer.echo("\n".join(lines))


@app.command()
def check(
    recipe: RecipePath, overrides: Overrides = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Validate a recipe, show what it resolves to, and find its data and base; loads no weights."""
    with command(as_json, debug) as output:
        from rich.console import Console

        from finetune.check import check as look
        from finetune.cli_show import show_check
        from finetune.recipe import load_recipe

        report = look(load_recipe(recipe, overrides or ()))
        if as_json:
            output.json(report.to_dict())
        else:
            show_check(report, Console())
        if report.problem:
            output.fail(report.problem)


class TrainCommand(TyperCommand):
    """What comes after `--` is accelerate's, and is kept apart from the overrides."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.obj = args[args.index("--") + 1 :] if "--" in args else []
        return super().parse_args(ctx, args[: args.index("--")] if "--" in args else args)


@app.command(
    cls=TrainCommand,
    options_metavar="[OPTIONS]",
    epilog="What follows `--` goes to accelerate: -- --config_file configs/ddp.yaml --num_processes 4",
)
def train(
    ctx: typer.Context,
    where: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run to go on with.")],
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter, measure it and export it; a run directory goes on where it stopped."""
    with command(as_json, debug):
        from finetune.cli_launch import become, launch_command
        from finetune.recipe import load_recipe, require_files
        from finetune.rundir import RunDir

        # A mistake is said now rather than after the seconds that accelerate takes to start.
        path = Path(where) / "recipe.yaml" if RunDir.is_run(where) else Path(where)
        require_files(load_recipe(path, overrides or ()))
        flags = ["--json"] * as_json + ["--debug"] * debug
        words = launch_command(where, overrides or (), ctx.obj, flags)
        typer.secho(shlex.join(words), dim=True, err=as_json)
        become(words)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the runs are.")] = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs, the newest last."""
    with command(as_json, debug) as output:
        from rich.console import Console

        from finetune.cli_show import show_runs
        from finetune.rundir import RunDir

        found = RunDir.all(folder)
        if as_json:
            output.json(
                [{"path": str(run.path), **run.info(), "latest": run.last_metrics()} for run in found]
            )
        elif found:
            show_runs(found, Console())
        else:
            typer.echo(f"no runs in {folder} yet; start one with: finetune train RECIPE")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this machine has, and what is missing."""
    with command(as_json, debug) as output:
        from rich.console import Console

        from finetune.cli_doctor import diagnose
        from finetune.cli_show import show_doctor

        found = diagnose()
        if as_json:
            output.json(found.to_dict())
        else:
            show_doctor(found, Console())
        if found.problems:
            raise typer.Exit(1)
