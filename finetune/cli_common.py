"""What all commands share: their options, how a mistake is said, and JSON on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from finetune.errors import sentence_of
from finetune.said import said_bytes as said_bytes  # for the commands

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, as in train.max_steps=100."),
]


@contextmanager
def command(as_json: bool, debug: bool, *, libraries: bool = False) -> Iterator[Output]:
    """Run the body of a command: what goes wrong becomes one sentence and exit status 1.

    `libraries`: the command uses torch and its neighbours, whose notices are kept off the screen.
    With --json, what a library prints goes to standard error, and a failure is also told as `{"error": ...}`.
    """
    output = Output(as_json)
    if libraries and not debug:
        from finetune.train.surroundings import quieten

        quieten()
    try:
        with redirect_stdout(sys.stderr) if as_json else _as_is():
            yield output
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        # Whoever read standard output has seen enough, as in `| head`; Python must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        output.fail("stopped")
    except Exception as error:
        if debug:
            raise
        output.fail(sentence_of(error))


class Output:
    """Where a command says its result: once, as JSON or as text."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    def json(self, value: Any) -> None:
        """One line of JSON."""
        print(json.dumps(value, ensure_ascii=False), file=self._stdout, flush=True)

    def fail(self, sentence: str, **found: Any) -> None:
        """Say what is wrong and end with exit status 1; `found` goes into the JSON beside it."""
        if self.as_json:
            self.json({**found, "error": sentence})
        typer.secho(sentence, fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


@contextmanager
def _as_is() -> Iterator[None]:
    yield
