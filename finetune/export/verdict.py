"""The verdict on an export: how far its judge is from the tuned model, and whether that is near enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.export.distance import Distance, Greedy
from finetune.export.judges import JUDGE_OF, LLAMA
from finetune.export.kept import Kept
from finetune.export.prompts import Prompts

# Two programs that compute the same in float32 differ by less; an error of one weight shows above it.
FLOAT32_LIMIT = 1e-4
# Of the spread of a position's logits: llama.cpp's 8-bit activations cost a hundredth of it or two, and a row
# or a nibble in the wrong place all of it.
AS_IT_IS_SHARE = 0.1
NOTE = "llama.cpp knows no YaRN with truncate: false; the tuned model was set to truncate: true for this"


@dataclass(frozen=True)
class Verdict:
    """How far the judge's logits are from the tuned model's, on `tokens` positions.

    What is allowed of rounded numbers is what bf16 costs the judge on the untuned base: at the typical
    (median) position, as rounding may send a token to another expert, which moves its logits by any amount.
    A merge into MXFP4 costs more and says how much, which `kept` measures anew. Where something was rounded,
    `reading` is how far the judge is from this program's own reading of the same files. `as_it_is` is how far
    llama.cpp, which computes with 8-bit activations, is at the typical position from itself with all values
    in float32. `effect` is the mean distance of the tuned model from its base (None without an adapter);
    `greedy_equal` of `greedy` next tokens are the same.
    """

    format: str
    judge: str
    prompts: str
    tokens: int
    max_difference: float
    max_allowed: float | None
    typical_difference: float
    typical_allowed: float | None
    mean_difference: float
    reading: float | None
    reading_allowed: float | None
    as_it_is: float | None
    as_it_is_allowed: float | None
    effect: float | None
    kept: Kept | None
    greedy: int
    greedy_equal: int
    passed: bool
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """Logits `[L, vocabulary]` of every sequence, which is a prompt and what the tuned model says to it.

    By the tuned model and by the judge with the export; where that matters, by this program with the export;
    and of a GGUF by llama.cpp with the file as it is, whose values the judge otherwise gets in float32.
    """

    prompts: Prompts
    sequences: list[list[int]]
    expected: list[Tensor]
    found: list[Tensor]
    read: list[Tensor] | None
    as_it_is: list[Tensor] | None


def judge_answers(
    export_format: str,
    answers: Answers,
    allowance: Distance | None,
    effect: float | None,
    kept: Kept | None,
) -> Verdict:
    """Whether the export passes.

    A next token may differ only where the model it is compared with is undecided within what is allowed. That
    is the tuned model, and for a merge into MXFP4 (which has `kept`) our reading of it. With an `allowance`
    for rounding, the mean distance must also be under half the adapter's effect.
    """
    expected, found, read = answers.expected, answers.found, answers.read
    distance = Distance.between(expected, found)
    reading = Distance.between(read, found).largest if read else None
    undecided = 2 * (allowance.largest if allowance else FLOAT32_LIMIT)
    greedy = Greedy.of(answers.prompts.ids, expected, found, undecided)
    as_it_is = Distance.between(found, answers.as_it_is).typical if answers.as_it_is else None
    spread = float(torch.cat(found).std(-1).median())
    # Comparisons that a NaN fails.
    passed = reading is None or reading <= FLOAT32_LIMIT
    passed = passed and (as_it_is is None or as_it_is <= AS_IT_IS_SHARE * spread)
    if kept and read:
        wrong = Greedy.of(answers.prompts.ids, read, found, undecided).wrong
        passed = passed and kept.as_stated and not wrong
    elif allowance:
        near = effect is None or distance.mean <= effect / 2
        passed = passed and near and distance.typical <= allowance.typical and not greedy.wrong
    else:
        passed = passed and distance.largest <= FLOAT32_LIMIT and not greedy.wrong
    return Verdict(
        format=export_format,
        judge=JUDGE_OF[export_format],
        prompts=answers.prompts.what,
        tokens=sum(map(len, answers.sequences)),
        max_difference=distance.largest,
        max_allowed=None if allowance or kept else FLOAT32_LIMIT,
        typical_difference=distance.typical,
        typical_allowed=None if kept else allowance.typical if allowance else FLOAT32_LIMIT,
        mean_difference=distance.mean,
        reading=reading,
        reading_allowed=None if reading is None else FLOAT32_LIMIT,
        as_it_is=as_it_is,
        as_it_is_allowed=None if as_it_is is None else AS_IT_IS_SHARE * spread,
        effect=effect,
        kept=kept,
        greedy=greedy.total,
        greedy_equal=greedy.equal,
        passed=passed,
        note=NOTE if JUDGE_OF[export_format] == LLAMA else None,
    )
