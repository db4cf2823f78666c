"""A model under test: one base in memory, and the adapter that makes it the tuned model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.chat.encode import HarmonyEncoder
    from finetune.model import Place
    from finetune.rundir import RunDir

Which = Literal["base", "tuned"]


@dataclass(frozen=True)
class Subject:
    """`model` is a PeftModel when `tuned`, else the bare base."""

    model: PreTrainedModel
    encoder: HarmonyEncoder
    tuned: bool

    @property
    def variants(self) -> tuple[Which, ...]:
        return ("base", "tuned") if self.tuned else ("base",)

    @contextmanager
    def acting_as(self, which: Which) -> Iterator[PreTrainedModel]:
        """The model as base (adapter switched off) or as tuned."""
        if self.tuned and which == "base":
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model


def require_model(where: str | Path) -> Place:
    """Where the model's files are, their headers checked: torch is not imported, which takes seconds.

    Raises:
        FinetuneError: nothing is there, a run has no adapter yet, or the checkpoint is broken.
    """
    from finetune.model import inspect_checkpoint, resolve
    from finetune.model.places import ADAPTER_FILE
    from finetune.rundir import RunDir

    if RunDir.is_run(where) and not (RunDir.open(where).adapter / ADAPTER_FILE).is_file():
        raise FinetuneError(
            f"this run has no adapter yet; finetune train {where} goes on with it", at=str(where)
        )
    place = resolve(where)
    inspect_checkpoint(place.base)
    return place


def load_encoder(where: str | Path) -> HarmonyEncoder:
    """The tokenizer of the model that `where` names; loads no weights."""
    from finetune.chat.encode import HarmonyEncoder
    from finetune.model import resolve

    return HarmonyEncoder.from_dir(resolve(where).base)


def load_subject(where: str | Path) -> Subject:
    """Load what `where` names: a run or adapter directory (both with their base), or a base alone.

    A run computes in the dtype that its recipe says, its weights placed and packed as they were in training.

    Raises:
        FinetuneError: nothing is there, a run has no adapter yet, or the adapter belongs to another base.
    """
    require_model(where)
    import torch
    from peft import PeftModel

    from finetune.model import load_model

    run = find_run(where)
    base = run.recipe().model if run else None
    model, _ = load_model(
        where,
        dtype=torch.float32 if base and base.dense == "float32" else None,
        nf4=base is not None and base.dense == "nf4",
        experts_on=base.experts_on if base else "device",
    )
    return Subject(model, load_encoder(where), isinstance(model, PeftModel))


def find_run(where: str | Path) -> RunDir | None:
    """The run that `where` names: itself, or the one whose adapter or checkpoint this is."""
    from finetune.rundir import RunDir

    path = Path(where)
    if not path.is_dir():
        return None
    path = path.resolve()
    if path.name == "adapter":
        path = path.parent
    elif path.parent.name == "checkpoints":
        path = path.parent.parent
    return RunDir.open(path) if RunDir.is_run(path) else None
