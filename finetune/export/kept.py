"""What another program, given an export that was rounded, shows of what was learned.

The figures of `retention`, which the export states of itself, measured anew: by whoever gives the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.packing import NOT_LEARNED
from finetune.export.layerwise import Passage

if TYPE_CHECKING:
    from finetune.export.judges import Logits

# How far a measured share may be from the stated one: float32 in another order may route a token elsewhere,
# and llama.cpp's rounded YaRN does to base, tuned model and export alike.
SHARE_LIMIT = 0.02
# With dense tensors in Q8_0, whose cost is not in what is stated: 0.045 was seen on random weights.
Q8_0_SHARE_LIMIT = 0.05


@dataclass(frozen=True)
class Row:
    """Tokens, and for each the next one where it is learned (else -100), `[L]` both."""

    ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Kept:
    """Shares of the tuned model's gain and change that are left; the first is None where it gains nothing.

    `stated_gain` and `stated_change` are what the export says, where it was measured on the same rows;
    `allowed` is how far from it another program may be.
    """

    tokens: int
    gain: float | None
    change: float | None
    same_greedy_word: float
    stated_gain: float | None
    stated_change: float | None
    allowed: float = SHARE_LIMIT

    @property
    def as_stated(self) -> bool:
        """Nothing is further from what is stated than another program may be."""
        pairs = ((self.gain, self.stated_gain), (self.change, self.stated_change))
        # A NaN fails the comparison.
        return all(
            stated is None or (found is not None and abs(found - stated) <= self.allowed)
            for found, stated in pairs
        )


def rows_of(passages: Sequence[Passage]) -> Iterator[Row]:
    """The examples that passages are packed of."""
    for passage in passages:
        starts = (passage.positions == 0).nonzero().flatten().tolist()
        for first, last in zip(starts, [*starts[1:], len(passage.ids)], strict=True):
            targets = passage.targets[first:last].clone()
            targets[-1] = NOT_LEARNED  # the next example's first token
            yield Row(passage.ids[first:last], targets)


def rows_of_sequences(sequences: Sequence[Sequence[int]]) -> Iterator[Row]:
    """Rows in which every token is learned."""
    for ids in sequences:
        yield Row(torch.tensor(ids), torch.tensor([*ids[1:], NOT_LEARNED]))


def measure_kept(
    rows: Sequence[Row],
    base: Logits,
    tuned: Logits,
    judge: Logits,
    stated: Mapping[str, Any] | None,
    *,
    allowed: float = SHARE_LIMIT,
) -> Kept:
    """Ask all three about every row; `stated` is what `retention.measure` returned for the same rows."""
    totals = dict.fromkeys(("tokens", "base", "tuned", "judge", "kl_base", "kl_judge", "same"), 0.0)
    for row in rows:
        learned = row.targets != NOT_LEARNED
        targets, ids = row.targets[learned], row.ids.tolist()
        logs = {
            name: ask(ids)[learned].log_softmax(-1)
            for name, ask in (("base", base), ("tuned", tuned), ("judge", judge))
        }
        totals["tokens"] += len(targets)
        for name, log in logs.items():
            totals[name] += float(F.nll_loss(log, targets, reduction="sum"))
        for name in ("base", "judge"):
            kl = F.kl_div(logs[name], logs["tuned"], log_target=True, reduction="sum")
            totals[f"kl_{name}"] += float(kl)
        totals["same"] += float((logs["judge"].argmax(-1) == logs["tuned"].argmax(-1)).sum())
    gain = totals["base"] - totals["tuned"]
    return Kept(
        tokens=round(totals["tokens"]),
        gain=(totals["base"] - totals["judge"]) / gain if gain > 0 else None,
        change=1 - totals["kl_judge"] / totals["kl_base"] if totals["kl_base"] > 0 else None,
        same_greedy_word=totals["same"] / totals["tokens"],
        stated_gain=stated["gain_kept"] if stated else None,
        stated_change=stated["change_kept"] if stated else None,
        allowed=allowed,
    )
