"""From `finetune train` to the `accelerate launch` command that it prints and runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from finetune.errors import FinetuneError
from finetune.train.surroundings import LISTENS

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


def supervise(command: Sequence[str]) -> int:
    """Run the command with this interpreter's own accelerate; returns the exit status.

    Ctrl-C and SIGTERM, whether they come from a terminal or to this process alone, are handed on to training
    as SIGINT. accelerate's parent process would die of them before training has saved: it inherits deafness
    (training sets a handler of its own) and, with training, a process group that a terminal does not signal.
    Until training says that it listens, there is nothing to save, and both are ended.

    Raises:
        FinetuneError: accelerate cannot be started, or was stopped before training began.
    """
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    try:
        with TemporaryDirectory() as folder:
            listens = Path(folder) / "listens"
            child = subprocess.Popen(program, process_group=0, env={**os.environ, LISTENS: str(listens)})

            def hand_on(number: int, frame: FrameType | None) -> None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGINT if listens.exists() else signal.SIGTERM)

            signal.signal(signal.SIGINT, hand_on)
            before |= {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGHUP)}
            status = child.wait()
    except OSError as error:
        raise FinetuneError(f"accelerate cannot be started: {error}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == -signal.SIGTERM:
        raise FinetuneError("stopped before training began")
    return 1 if status else 0


def _one_process() -> list[str]:
    config = Path(__file__).resolve().parent.parent / "configs" / "single.yaml"
    if not config.is_file():
        return _SINGLE
    here = Path.cwd()
    return ["--config_file", str(config.relative_to(here) if config.is_relative_to(here) else config)]
