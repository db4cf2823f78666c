"""An adapter merged into its base, by itself or on the way to a layout that holds a model's weights only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.export.bf16 import write_bf16
from finetune.export.bundle import copy_companions
from finetune.export.mxfp4 import write_mxfp4
from finetune.export.passages import find_passages
from finetune.export.subject import Base, Subject
from finetune.model import fingerprint, inspect_checkpoint

# Inside the unfinished export, so that a killed one goes on with it; gone when the export is done.
FOLDER = "merged"


@dataclass(frozen=True)
class Rounding:
    """How to round to MXFP4: conversations to fit to (else the run's), and the share of the gain to keep."""

    calibrate: Path | None
    kept_at_least: float


def merge_into_mxfp4(subject: Subject, folder: Path, rounding: Rounding) -> dict[str, Any]:
    """Write the merged checkpoint's files into `folder`; returns the figures of the proof.

    Raises:
        FinetuneError: as `write_mxfp4` and `find_passages`.
    """
    passages = find_passages(subject, rounding.calibrate)
    return write_mxfp4(subject, folder, passages, kept_at_least=rounding.kept_at_least)


def lay_out(
    subject: Subject, folder: Path, rounding: Rounding, write: Callable[[Subject, Path], dict[str, Any]]
) -> dict[str, Any]:
    """`write` a model into `folder`, after merging its adapter if it has one; returns the proof's figures.

    The merge is in the numbers that the base's experts are in, and its figures are under `merged`.

    Raises:
        FinetuneError: what merging or `write` raises.
    """
    if subject.tuned is None:
        return write(subject, folder)
    between = folder / FOLDER
    between.mkdir(exist_ok=True)
    if inspect_checkpoint(subject.base.path).kind == "mxfp4":
        figures = {"into": "mxfp4", **merge_into_mxfp4(subject, between, rounding)}
    elif rounding.calibrate is None:
        figures = {"into": "bf16", **write_bf16(subject, between)}
    else:
        raise FinetuneError(
            "the base's experts are not MXFP4, so there is no rounding to fit", at=subject.base.name
        )
    copy_companions(subject.base.path, between)
    title = subject.run.recipe().name if subject.run else subject.tuned.folder.name
    model = Subject(Base(title, between), fingerprint(between), None, None)
    proof = write(model, folder)
    shutil.rmtree(between)
    return {"merged": figures, **proof}
