"""Steps one and two prove that every part of the adapter learns."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from finetune.model import CoverageCheck
from finetune.rundir import RunDir


class StopWithoutGradient(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Runs `CoverageCheck` on the gradients of the first two steps, before the optimizer uses them.

    lora_A has a gradient only once lora_B, which begins as zeros, has made a step: hence two. What was found
    goes to run.json: how many experts there are (over all layers and both projections), and how many had a
    gradient.
    """

    def __init__(self, model: Any, run: RunDir) -> None:
        self._check, self._run = CoverageCheck(model), run
        self._found: dict[str, Any] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step + 1
        if step <= CoverageCheck.LAST_STEP:
            self._found[f"step {step}"] = self._check.check(step)
            if state.is_world_process_zero:
                self._run.update(coverage=self._found)
