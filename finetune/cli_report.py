"""`finetune report`: a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli_common import Debug, Json, command


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; RUN/report.html unless given.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file on a run: recipe, curves, base against tuned, answers, exports and their proofs."""
    with command(as_json, debug) as output:
        from finetune.report import gather, write_report
        from finetune.rundir import RunDir

        path = write_report(run, out)
        if as_json:
            output.json({"report": str(path), **gather(RunDir.open(run)).to_dict()})
        else:
            typer.echo(f"wrote {path}")
