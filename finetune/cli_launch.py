"""From `finetune train` to the `accelerate launch` command that it prints and becomes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from finetune.errors import FinetuneError

# The same as configs/single.yaml, for an installation without the checkout around it.
_SINGLE = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch_command(
    where: str, overrides: Sequence[str], launcher: Sequence[str], flags: Sequence[str]
) -> list[str]:
    """The command line; `launcher` are the user's own arguments for accelerate, which replace ours."""
    # Without it, accelerate adds a traceback of its own to the sentence that training ended with.
    quiet = [] if "--debug" in flags else ["--quiet"]
    arguments = [*quiet, *(launcher or _one_process())]
    return ["accelerate", "launch", *arguments, "-m", "finetune.train", where, *overrides, *flags]


def become(command: Sequence[str]) -> NoReturn:
    """Replace this process by the command, run with this interpreter's own accelerate.

    Ctrl-C goes to every process of the terminal's group. accelerate's parent would die of it and take the
    training along before it has saved, so it is made deaf to it; training sets a handler of its own.

    Raises:
        FinetuneError: accelerate cannot be started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    try:
        os.execv(sys.executable, program)
    except OSError as error:
        raise FinetuneError(f"accelerate cannot be started: {error}") from error


def _one_process() -> list[str]:
    config = Path(__file__).resolve().parent.parent / "configs" / "single.yaml"
    if not config.is_file():
        return _SINGLE
    here = Path.cwd()
    return ["--config_file", str(config.relative_to(here) if config.is_relative_to(here) else config)]
