"""`accelerate launch -m finetune.train RECIPE|RUN [k=v ...] [--json] [--debug]`

Trains the adapter that a recipe describes, measures and exports it; given a run directory, goes on where
the run stopped. Exit status: 0 done, 1 said why (a stop by Ctrl-C or SIGTERM included), 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.check import require_ready
from finetune.errors import FinetuneError, sentence_of
from finetune.model.cpu_settings import ask_for_large_pages
from finetune.recipe import Recipe, dump_recipe
from finetune.rundir import RunDir, recipe_of
from finetune.train.surroundings import LISTENS, quieten, set_up_wandb


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    # Started deaf to Ctrl-C (by `finetune train`, or in the background of a shell), it listens from here on.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if LISTENS in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ[LISTENS]).touch()
    first, out = os.environ.get("RANK", "0") == "0", sys.stdout
    try:
        # Whatever a library prints must not get between a machine and its JSON.
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            result = train(options)
    except KeyboardInterrupt:
        result = {"status": "stopped", "error": "stopped before there was a run"}
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        result = {"status": "failed", "error": sentence_of(error)}
    if first and "error" in result:
        print(result["error"], file=sys.stderr)
    if first and options.json:
        print(json.dumps(result), file=out)
    return 1 if "error" in result else 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and export; returns what --json prints.

    Raises:
        FinetuneError: whatever keeps the run from being done.
    """
    going_on = RunDir.is_run(options.recipe)
    recipe = recipe_of(options.recipe, options.overrides)
    if not options.debug:
        quieten()
    # Packs are of one length but experts' rows are not: without this, pieces of GPU memory are left over that
    # nothing fits in.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    ask_for_large_pages()

    import torch
    from accelerate import PartialState
    from rich.console import Console

    state = PartialState(cpu=not torch.cuda.is_available())
    console = Console(stderr=options.json, highlight=False, markup=False, soft_wrap=True)
    run = _run_directory(options.recipe, recipe, state)
    set_up_wandb(recipe, run.path)

    from finetune.train.session import fit

    with _status_kept(run, state):
        if state.is_main_process:
            console.print(f"run directory: {run.path}")
        if going_on and run.info()["status"] == "done" and not options.overrides:
            console.print("this run is done: `finetune eval` measures it again, overrides train it further")
            return {"run": str(run.path), "status": "done"}
        if state.is_main_process:
            _note(run, options, recipe, state, going_on)
        if options.overrides or not run.adapter.is_dir():
            with _named_knob(recipe):
                outcome = fit(recipe, run, state, console)
            if outcome.stopped:
                return _stopped(run, state, f"stopped after step {outcome.step} of {outcome.steps}")
        # What follows takes one process; the others leave.
        state.destroy_process_group()
        if state.is_main_process:
            from finetune.pipeline import after_training

            return {"run": str(run.path), "status": "done", **after_training(run, console)}
    return {"status": "done"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune.train", description="Train an adapter, measure and export it."
    )
    parser.add_argument("recipe", metavar="RECIPE|RUN", help="a recipe, or a run directory to go on with")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted.key=value, the value is YAML"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, progress on stderr")
    parser.add_argument("--debug", action="store_true", help="tracebacks and the libraries' own messages")
    return parser


def _run_directory(where: str, recipe: Recipe, state: Any) -> RunDir:
    """A new run, or the one to go on with; the first process makes it and tells the others where.

    What is found wrong before leaves no run behind.
    """
    from accelerate.utils import broadcast_object_list

    path: list[str | None] = [None]
    if state.is_main_process:
        if RunDir.is_run(where):
            run = RunDir.open(where)
        else:
            require_ready(recipe, alone=state.num_processes == 1)
            run = RunDir.create(recipe)
        path = [str(run.path)]
    broadcast_object_list(path)
    return RunDir.open(str(path[0]))


def _note(run: RunDir, options: argparse.Namespace, recipe: Recipe, state: Any, going_on: bool) -> None:
    """Write to run.json how this session came about, and to recipe.yaml what overrides changed."""
    from finetune.train.record import provenance

    about = provenance([options.recipe, *options.overrides], state.num_processes)
    if not going_on:
        run.update(**about)
        return
    run.update(error=None, went_on=[*run.info().get("went_on", []), about])
    if options.overrides:
        (run.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")


def _stopped(run: RunDir, state: Any, what: str) -> dict[str, Any]:
    if state.is_main_process:
        run.update(status="stopped")
    return {
        "run": str(run.path),
        "status": "stopped",
        "error": f"{what}; `finetune train {run.path}` goes on",
    }


@contextlib.contextmanager
def _named_knob(recipe: Recipe) -> Iterator[None]:
    """Where a GPU's memory does not do, say which setting of this recipe needs less of it.

    Raises:
        FinetuneError: in place of torch's exception.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        from finetune.predict.advice import smallest_change

        # The first setting that saves memory at all: every other recipe is taken to fit.
        change = smallest_change(recipe, lambda other: float(other == recipe), 0.5)
        knob = " ".join(change.overrides)
        advice = f"{knob} needs less" if knob else "nothing in this recipe can be made smaller"
        asked = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
        reason = f" ({asked[0][0].lower()}{asked[0][1:]})" if asked else ""
        raise FinetuneError(f"the GPU ran out of memory in training{reason}; {advice}") from error


@contextlib.contextmanager
def _status_kept(run: RunDir, state: Any) -> Iterator[None]:
    """Let run.json say so when the run fails or is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise FinetuneError(_stopped(run, state, "interrupted")["error"]) from None
    except Exception as error:
        if state.is_main_process:
            # On a full disk this fails as well, and the first failure is the one to tell.
            with contextlib.suppress(FinetuneError):
                run.update(status="failed", error=sentence_of(error))
        raise


if __name__ == "__main__":
    sys.exit(main())
