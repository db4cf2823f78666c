"""How much there is to learn from, from the first rows of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.chat import HarmonyEncoder, Segment
    from finetune.recipe import Recipe

# Bytes of examples that are tokenised to learn how many bytes a token has: some 0.1 s of a check.
SAMPLED_BYTES = 500_000
# English in o200k has between 4 and 5 bytes a token; for a base whose tokenizer is not here.
BYTES_PER_TOKEN = 4.5


@dataclass(frozen=True)
class Sample:
    """What is known of a recipe's data: `tokens` in all that is learned from, `fill` the share of a pack that
    examples fill, `lengths` in tokens and `learned` share of the examples that were looked at."""

    tokens: float
    fill: float
    learned: float
    lengths: Sequence[int]


class Lengths:
    """Collects the lengths of examples: the first are tokenised, the others judged by their bytes."""

    def __init__(self, encoder: HarmonyEncoder | None) -> None:
        self._encoder = encoder
        self._bytes: list[int] = []
        self._sampled_bytes = self._sampled_tokens = self._learned = 0

    def note(self, example: list[Segment]) -> None:
        size = sum(len(segment.text.encode()) for segment in example)
        self._bytes.append(size)
        if self._encoder is not None and self._sampled_bytes < SAMPLED_BYTES:
            encoded = self._encoder.encode(example)
            self._sampled_bytes += size
            self._sampled_tokens += len(encoded.ids)
            self._learned += sum(encoded.learn)

    def sample(self, recipe: Recipe, rows_share: float) -> Sample | None:
        """For training, where what was looked at is `rows_share` of all; None where there was nothing."""
        from finetune.data.packing import best_fit

        spec = recipe.data
        per_token = self._sampled_bytes / self._sampled_tokens if self._sampled_tokens else BYTES_PER_TOKEN
        lengths = [max(1, round(size / per_token)) for size in self._bytes]
        if spec.too_long == "drop":
            lengths = [length for length in lengths if length <= spec.max_tokens]
        lengths = [min(length, spec.max_tokens) for length in lengths]
        if not lengths:
            return None
        held_out = spec.held_out if isinstance(spec.held_out, float) else 0.0
        tokens = sum(lengths) / rows_share * (1 - held_out)
        learned = self._learned / self._sampled_tokens if self._sampled_tokens else 1.0
        packs = [sum(lengths[i] for i in pack) for pack in best_fit(lengths, recipe.tokens_per_pass)]
        # The last pack is as full as the data happens to leave it.
        full = sorted(packs)[1:] or packs
        return Sample(tokens, sum(full) / len(full) / recipe.tokens_per_pass, learned, lengths)
