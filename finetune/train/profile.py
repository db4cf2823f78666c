"""`train.profile: true`: a trace of a few steps, and one page that says where their time and memory went.

    <run>/profile/trace.json    for chrome://tracing or ui.perfetto.dev
    <run>/profile/summary.txt   the page

Steps are profiled once the first ones are over, in which every buffer grows and coverage is checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from finetune.errors import writing
from finetune.train.progress import peak_memory_gb

# Steps that are recorded; a trace of more is slow to open and says nothing new.
RECORDED = 2
# Steps before them: coverage is checked in two, and a third lets the profiler's own cost settle.
SKIPPED, WARM_UP = 2, 1
# Operators on the page.
OPERATORS = 12
# What a step does, and the profiler's names for it. Autograd calls a backward after its function.
PARTS = {
    "experts, forward": r"_ExpertLayer",
    "experts, backward": r"_ExpertLayerBackward",
    "attention scores, forward and recomputed": r"_PackedAttention",
    "attention scores, backward": r"_PackedAttentionBackward",
    "output head and loss, forward": r"_?\w*LogProb\w*(?<!Backward)",
    "output head and loss, backward": r"_?\w*LogProb\w*Backward",
    "update": r"Optimizer\.step#.*",
    "waiting for data": r"enumerate\(DataLoader\).*",
}
REST = "the rest: projections, norms, router, gaps"


class StepProfile(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Records some steps of the first process; model and optimizer come from the trainer's calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profile: Any = None
        self._sizes: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps = state.max_steps - state.global_step
        if not state.is_world_process_zero or steps < 1:
            return
        active = min(RECORDED, steps)
        warm_up = min(WARM_UP, steps - active)
        skipped = min(SKIPPED, steps - active - warm_up)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=skipped, warmup=warm_up, active=active, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None:
            self._sizes = sizes(kwargs["model"], kwargs["optimizer"])
            self._profile.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: Any) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self.folder / "trace.json"))
            page = summary(recorded.key_averages(), self._sizes, peak_memory_gb())
            (self.folder / "summary.txt").write_text(page, encoding="utf-8")


def sizes(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Bytes of what stays in memory: frozen weights, packed or not, adapter, gradients, moments."""
    found = dict.fromkeys(("packed experts", "dense weights", "adapter", "gradients", "optimizer"), 0.0)
    for parameter in model.parameters():
        kind = "adapter" if parameter.requires_grad else "dense weights"
        found["packed experts" if parameter.dtype == torch.uint8 else kind] += parameter.nbytes
        if parameter.requires_grad:  # cleared by now, but as large as its parameter
            found["gradients"] += parameter.nbytes
    for state in optimizer.state.values():
        tensors = (value for value in state.values() if isinstance(value, torch.Tensor))
        found["optimizer"] += sum(tensor.nbytes for tensor in tensors)
    return found


def summary(events: Any, sizes: dict[str, float], peak_gb: float) -> str:
    """The page: parts of a step, operators, and memory. `events` are those of `key_averages`."""
    steps = [event for event in events if event.key.startswith("ProfilerStep")]
    count = sum(event.count for event in steps)
    whole = sum(event.cpu_time_total for event in steps)
    lines = [
        f"{count} steps of {whole / count / 1e6:.3f} s",
        "",
        _row("where the time went", "s a step", "share"),
    ]
    rest = whole
    for name, pattern in PARTS.items():
        spent = sum(_inclusive(event) for event in events if re.fullmatch(pattern, event.key))
        rest -= spent
        if spent:
            lines.append(_row(name, f"{spent / count / 1e6:.3f}", f"{spent / whole:.1%}"))
    lines.append(_row(REST, f"{rest / count / 1e6:.3f}", f"{rest / whole:.1%}"))
    lines += ["", _row("operators, without what they call", "s a step", "calls")]
    own = sorted((e for e in events if e not in steps), key=_own, reverse=True)
    lines += [
        _row(e.key[:60], f"{_own(e) / count / 1e6:.3f}", f"{e.count // count:,}") for e in own[:OPERATORS]
    ]
    lines += ["", _row("where the memory went", "GB", "share")]
    for name, size in sizes.items():
        lines.append(_row(name, f"{size / 1e9:.3f}", f"{size / 1e9 / peak_gb:.1%}"))
    other = peak_gb - sum(sizes.values()) / 1e9
    lines.append(_row("activations, scratch, logits, libraries", f"{other:.3f}", f"{other / peak_gb:.1%}"))
    lines.append(_row("peak", f"{peak_gb:.3f}", ""))
    return "\n".join(lines) + "\n"


def _inclusive(event: Any) -> float:
    """Microseconds with everything it calls: on the GPU where it worked there, else on the processor."""
    return float(event.device_time_total or event.cpu_time_total)


def _own(event: Any) -> float:
    return float(event.self_device_time_total or event.self_cpu_time_total)


def _row(name: str, *figures: str) -> str:
    return f"{name:<62}" + "".join(f"{figure:>12}" for figure in figures)
