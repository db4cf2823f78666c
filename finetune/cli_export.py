"""Commands of exports: write them, have them judged, and read other layouts back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune.cli_common import Debug, Json, command

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.export.verdict import Verdict


def export(
    where: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER|CHECKPOINT", help="A run, an adapter directory or a model.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="The adapter: adapter (PEFT's layout), gguf-lora or sglang-lora. "
            "Merged: mxfp4, bf16, gguf or openai; all but mxfp4 also take a model without an adapter.",
        ),
    ] = "adapter",
    base: Annotated[
        str | None, typer.Option(help="The base of a bare adapter: a directory, a hub id or nano.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Conversations that merging into MXFP4 is fitted to; else the run's data."
        ),
    ] = None,
    kept_at_least: Annotated[
        float, typer.Option(help="The share of what was gained that merging into MXFP4 has to keep.")
    ] = 0.9,
    dense: Annotated[
        Literal["bf16", "q8_0"], typer.Option(help="gguf: the numbers of attention and embeddings.")
    ] = "bf16",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what was trained for other tools to load."""
    with command(as_json, debug, libraries=True) as output:
        from finetune.export import export as write

        facts = write(
            where,
            to,
            out,
            base=base,
            calibrate=calibrate,
            kept_at_least=kept_at_least,
            dense=dense,
            force=force,
        )
        if as_json:
            output.json(facts)
        else:
            from finetune.export.proof import in_words

            typer.echo(f"wrote {out} ({to}): {in_words(facts)}")


def verify(
    where: Annotated[Path, typer.Argument(metavar="DIR", help="An export.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|ADAPTER|CHECKPOINT", help="What it was made from, where that is not found."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows to ask about; the run's held-out rows if not given."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Load an export with another program and compare it with the tuned model: logits and greedy tokens."""
    with command(as_json, debug, libraries=True) as output:
        from rich.console import Console

        from finetune.export.verify import verify as compare

        verdict = compare(where, against=against, data=data)
        if as_json:
            output.json(verdict.to_dict())
        else:
            show_verdict(verdict, Console())
        if not verdict.passed:
            raise typer.Exit(1)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A GGUF, OpenAI's original/, or a checkpoint directory.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where tokenizer.json is, if not beside the source.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put a gpt-oss of another layout into the released one, to train on."""
    with command(as_json, debug, libraries=True) as output:
        from finetune.export.importing import import_model

        facts = import_model(source, out, tokenizer=tokenizer, force=force)
        if as_json:
            output.json(facts)
        else:
            typer.echo(f"wrote {out}: {facts['kind']}, from {facts['proof']['imported_from']}")


def show_verdict(verdict: Verdict, console: Console) -> None:
    """The figures beside what is allowed, then the outcome."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in (f"{verdict.format}, by {verdict.judge}", "found", "allowed"):
        table.add_column(heading, justify="left" if heading.startswith(verdict.format) else "right")
    found, allowed = verdict.max_difference, verdict.max_allowed
    rows = [("largest difference of logits", f"{found:.2g}", f"{allowed:.2g}" if allowed else "")]
    found, allowed = verdict.typical_difference, verdict.typical_allowed
    rows.append(("at the typical position", f"{found:.2g}", f"{allowed:.2g}" if allowed else ""))
    rows.append(("mean difference", f"{verdict.mean_difference:.2g}", ""))
    if verdict.effect is not None:
        rows.append(("mean effect of the adapter", f"{verdict.effect:.2g}", ""))
    if verdict.reading is not None:
        rows.append(("largest, from our reading", f"{verdict.reading:.2g}", f"{verdict.reading_allowed:.2g}"))
    if verdict.as_it_is is not None:
        found, allowed = verdict.as_it_is, verdict.as_it_is_allowed
        rows.append(("typical, the file as it is", f"{found:.2g}", f"{allowed:.2g}"))
    rows.append(("greedy tokens equal", f"{verdict.greedy_equal} of {verdict.greedy}", ""))
    rows += _kept_rows(verdict)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"asked about {verdict.prompts}: {verdict.tokens} positions", markup=False)
    if verdict.note:
        console.print(verdict.note, markup=False)
    good = "this is the model that it was made from"
    if verdict.kept:
        good = "the files hold the tuned model as it was rounded, and it keeps what is stated"
    if verdict.passed:
        console.print(good, style="green")
    else:
        console.print("this is NOT the model that it was made from", style="red")


def _kept_rows(verdict: Verdict) -> list[tuple[str, str, str]]:
    """What a merge into MXFP4 keeps; beside it what the export says of itself."""
    kept = verdict.kept
    if kept is None:
        return []
    figures = (("gain", kept.gain, kept.stated_gain), ("change", kept.change, kept.stated_change))
    return [
        (f"{name} kept, on {kept.tokens} tokens", f"{found:.1%}", f"{stated:.1%} stated" if stated else "")
        for name, found, stated in figures
        if found is not None
    ]
