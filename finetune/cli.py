"""The `finetune` command. Stages are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand

from finetune.cli_bench import bench
from finetune.cli_common import Debug, Json, Overrides, command
from finetune.cli_export import export, import_, verify
from finetune.cli_report import report
from finetune.cli_serve import serve

app = typer.Typer(
    name="finetune",
    help="Customise gpt-oss on the weights as released.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
ModelName = Annotated[
    str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, a checkpoint directory, a hub id or nano.")
]
System = Annotated[str | None, typer.Option(help="Instructions put in front.")]
Effort = Annotated[Literal["low", "medium", "high"] | None, typer.Option(help="How much the model thinks.")]
Tools = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Functions the model may call: a JSON list, as in OpenAI's API."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, thinking included.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total share.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed and prompts give the same answers.")]


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
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Predict for this GPU instead of this machine: h100-80, rtx4090, 16gb, ..."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="What the machine costs an hour, in any currency.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Validate a recipe, find its data and base, and predict memory, time and cost; loads no weights."""
    with command(as_json, debug) as output:
        from rich.console import Console

        from finetune.check import check as look
        from finetune.cli_show import show_check
        from finetune.recipe import load_recipe

        found = load_recipe(recipe, overrides or ())
        # The first check on a machine times its processor, which takes longer than all the rest.
        with Console(stderr=True).status("looking at data, base and machine"):
            report = look(found, gpu=gpu, price=price)
        if not as_json:
            show_check(report, Console())
        if report.problem:
            output.fail(report.problem, **report.to_dict())
        elif as_json:
            output.json(report.to_dict())


@app.command()
def data(
    where: Annotated[
        str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a file of conversations.")
    ],
    overrides: Overrides = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where tokenizer.json is; the base's unless given.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="Show so many rows: 3 unless given, or all as JSON.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show conversations as the model will see them, learned tokens marked, and what became of all rows."""
    with command(as_json, debug, libraries=True) as output:
        from finetune.data.show import data_lines, show_data
        from finetune.rundir import cache_folder

        if as_json:
            for line in data_lines(where, overrides or [], tokenizer=tokenizer, rows=rows):
                output.json(line)
        else:
            show_data(
                where,
                overrides or [],
                cache_dir=cache_folder(),
                tokenizer=tokenizer,
                rows=3 if rows is None else rows,
            )


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
        from finetune.check import require_ready
        from finetune.cli_launch import launch_command, supervise
        from finetune.recipe import require_files
        from finetune.rundir import RunDir, recipe_of

        # A mistake is said now rather than after the seconds that accelerate takes to start.
        recipe = recipe_of(where, overrides or ())
        if RunDir.is_run(where):
            require_files(recipe)
        else:
            # How a launcher's own arguments share the model out is not known here.
            require_ready(recipe, alone=not ctx.obj)
        flags = ["--json"] * as_json + ["--debug"] * debug
        words = launch_command(where, overrides or (), ctx.obj, flags)
        typer.secho(shlex.join(words), dim=True, err=as_json)
        # What went wrong there was said there.
        raise typer.Exit(supervise(words))


@app.command("eval")
def evaluate(
    where: ModelName,
    overrides: Overrides = None,
    task: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure on these rows instead of the recipe's tasks.")
    ] = None,
    metric: Annotated[
        Literal["exact_match", "number", "tool_call"],
        typer.Option(help="What makes an answer to --task right."),
    ] = "exact_match",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions of each task.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure base against tuned: held-out loss, and every task of the recipe.

    A model without a run is measured on --task alone, and takes changes to the eval section only. In a run,
    --task and --limit leave eval/summary.json as it is and write to a folder beside it.
    """
    with command(as_json, debug, libraries=True) as output:
        from rich.console import Console

        from finetune.cli_eval import measure

        summary = measure(where, overrides or (), task=task, metric=metric, limit=limit)
        if as_json:
            output.json(summary.to_dict())
        else:
            Console().print(summary.table())


@app.command()
def generate(
    where: ModelName,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Questions to answer.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows in any shape of data, or .txt: a prompt a line.")
    ] = None,
    system: System = None,
    effort: Effort = None,
    tools: Tools = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 32,
    base: Annotated[bool, typer.Option("--base", help="Leave the run's adapter out.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer prompts in batches: arguments, a file, or standard input. --json prints one object a line."""
    with command(as_json, debug, libraries=True) as output:
        from finetune.evaluate.prompts import Setting
        from finetune.evaluate.talk import Sampling, generate_command

        generate_command(
            where,
            prompts or (),
            file=file,
            setting=Setting.read(system, effort, tools),
            sampling=Sampling(max_new_tokens, temperature, top_p, seed),
            batch_size=batch_size,
            base=base,
            emit=output.json if as_json else None,
        )


@app.command()
def chat(
    where: ModelName,
    system: System = None,
    effort: Effort = None,
    tools: Tools = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk to a model; its reasoning is shown apart.

    With --json, each line of standard input is a message, and each answer one object a line.
    """
    with command(as_json, debug, libraries=True) as output:
        from finetune.evaluate.prompts import Setting
        from finetune.evaluate.talk import Sampling, chat_command

        chat_command(
            where,
            setting=Setting.read(system, effort, tools),
            sampling=Sampling(max_new_tokens, temperature, top_p, seed),
            emit=output.json if as_json else None,
        )


app.command()(export)
app.command()(verify)
app.command("import")(import_)
app.command()(bench)
app.command()(serve)
app.command()(report)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("runs"),
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
