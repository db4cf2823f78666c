"""Steps one and two prove that every part of the adapter learns."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from finetune.model import CoverageCheck


class StopWithoutGradient(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Runs `CoverageCheck` on the gradients of the first two steps, before the optimizer uses them.

    lora_A has a gradient only once lora_B, which begins as zeros, has made a step: hence two.
    """

    def __init__(self, model: Any) -> None:
        self._check = CoverageCheck(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < 2:
            self._check.check(state.global_step + 1)
