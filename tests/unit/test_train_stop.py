"""Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.train.stop import StopOnSignal


def after_step(stop: StopOnSignal, step: int) -> Any:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    state = SimpleNamespace(global_step=step, max_steps=10)
    stop.on_step_end(SimpleNamespace(world_size=1), state, control)
    return control


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_then_saves_and_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopOnSignal()
    stop.install()
    try:
        assert not after_step(stop, 1).should_training_stop
        os.kill(os.getpid(), number)
        control = after_step(stop, 2)
        assert control.should_save and control.should_training_stop and stop.stopped
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a second Ctrl-C should quit at once"
    finally:
        stop.uninstall()
    assert signal.getsignal(number) == before


def test_a_signal_during_the_last_step_lets_the_run_end_as_usual() -> None:
    stop = StopOnSignal()
    stop.requested = True
    assert not after_step(stop, 10).should_training_stop
    assert not stop.stopped
