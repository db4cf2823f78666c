"""The conversations that an export is fitted to, and those that its cost is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.chat import HarmonyEncoder
from finetune.data import Examples, PackedDataset, prepare_data
from finetune.data.packing import NOT_LEARNED
from finetune.errors import FinetuneError
from finetune.export.layerwise import Passage
from finetune.export.peft_files import Sizes
from finetune.export.subject import Subject
from finetune.recipe import DataSpec, ModelSpec, Recipe, Source
from finetune.rundir import cache_folder

# Values of one residual stream in float32: 50 MB, of which base, tuned model and export have one each; or
# 4,369 tokens of gpt-oss, whose merge then takes two cores less than an hour; small models stop at
# MOST_TOKENS, where more no longer helps.
CALIBRATION_VALUES = 3 << 22
HELD_OUT_VALUES = 1 << 22
MOST_TOKENS = 1 << 15
# Of a file that is given for calibration, this share is measured on instead.
HELD_OUT_SHARE = 0.125
LONGEST_PASSAGE = 4096


@dataclass(frozen=True)
class Passages:
    """`what` says in words where they come from."""

    calibration: list[Passage]
    held_out: list[Passage]
    what: str


def find_passages(subject: Subject, file: Path | None) -> Passages | None:
    """Conversations of `file`, else of the run's own data; None where there is neither.

    Raises:
        FinetuneError: they cannot be read, or there are too few to hold some back.
    """
    if file is not None:
        source = Source(path=str(file))
        data = DataSpec(train=[source], held_out=HELD_OUT_SHARE, too_long="drop", cache=False)
        recipe = Recipe(name="calibrate", model=ModelSpec(base=subject.base.name), data=data)
        what, cache = f"rows of {file.name}", cache_folder()
    elif subject.run:
        recipe, what, cache = subject.run.recipe(), "the run's data", subject.run.cache
    else:
        return None
    prepared = prepare_data(recipe, HarmonyEncoder.from_dir(subject.base.path), cache_dir=cache)
    if not len(prepared.held_out):
        raise FinetuneError(
            "there are no held-out conversations to measure the export's cost on; give some with --calibrate",
            at=str(file or subject.base.name),
        )
    hidden = Sizes.of(subject.base.path).hidden
    return Passages(
        list(_packed(prepared.train, CALIBRATION_VALUES // hidden)),
        list(_packed(prepared.held_out, HELD_OUT_VALUES // hidden)),
        what,
    )


def _packed(examples: Examples, tokens: int) -> Iterator[Passage]:
    """About so many tokens of examples drawn from all of them."""
    drawn = np.random.default_rng(0).permutation(len(examples))
    enough = np.searchsorted(np.cumsum(examples.lengths[drawn]), min(tokens, MOST_TOKENS)) + 1
    chosen = examples.select(drawn[:enough])
    packs = PackedDataset(chosen, max(LONGEST_PASSAGE, int(chosen.lengths.max())))
    for pack in (packs[index] for index in range(len(packs))):
        targets = torch.cat([pack["labels"][1:], torch.tensor([NOT_LEARNED])])
        yield Passage(pack["input_ids"], targets, pack["position_ids"])
