"""Stopping in good order: a signal lets the step finish, saves a checkpoint and ends training."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Between `install` and `uninstall`, SIGINT and SIGTERM end training after the current step.

    So does the end of accelerate's launcher, which a signal to it alone would kill. A second SIGINT kills the
    process at once. Under several processes all stop at the same step, whichever of them was told first.
    """

    def __init__(self) -> None:
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self.requested = False
        self.stopped = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def uninstall(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nstopping after this step; Ctrl-C again quits at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and self._any_process(args):
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def _any_process(self, args: Any) -> bool:
        alone = self._launcher is not None and os.getppid() != self._launcher
        if args.world_size == 1:
            return self.requested or alone
        asked = torch.tensor(int(self.requested or alone), device=args.device)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())
