"""What became of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from finetune.data.tokenise import Chunk

# Reasons may quote the row, so there can be as many as rows; this many are told apart, and shown with their
# place.
SHOWN_REASONS = 20
OTHER_REASONS = "other reasons"
HISTOGRAM_BINS = 12


@dataclass
class Counts:
    """Rows read from one set of sources and what was left out. `places` are the first bad rows as (place,
    reason).
    """

    rows: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    places: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    lowest_key: int = 2**64 - 1
    highest_key: int = 0

    def add_chunk(self, chunk: Chunk) -> None:
        """Count the rows of a batch."""
        self.rows += chunk.rows
        self.lowest_key = min(self.lowest_key, chunk.lowest_key)
        self.highest_key = max(self.highest_key, chunk.highest_key)
        self.dropped += chunk.dropped
        self.truncated += chunk.truncated
        for at, reason in chunk.skipped:
            self._skip(at, reason)

    def _skip(self, at: str, reason: str) -> None:
        self.skipped += 1
        known = reason in self.reasons or len(self.reasons) < SHOWN_REASONS
        key = reason if known else OTHER_REASONS
        self.reasons[key] = self.reasons.get(key, 0) + 1
        if len(self.places) < SHOWN_REASONS:
            self.places.append((at, reason))

    def __add__(self, other: Counts) -> Counts:
        total = Counts(
            rows=self.rows + other.rows,
            skipped=self.skipped + other.skipped,
            reasons=dict(self.reasons),
            places=(self.places + other.places)[:SHOWN_REASONS],
            dropped=self.dropped + other.dropped,
            truncated=self.truncated + other.truncated,
            lowest_key=min(self.lowest_key, other.lowest_key),
            highest_key=max(self.highest_key, other.highest_key),
        )
        for reason, times in other.reasons.items():
            total.reasons[reason] = total.reasons.get(reason, 0) + times
        return total

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counts:
        return cls(**{**values, "places": [(at, reason) for at, reason in values["places"]]})


@dataclass(frozen=True)
class DataReport:
    """The data of a run in numbers, train and held-out rows together where not said otherwise.

    `dropped` and `truncated` count examples over `max_tokens`; a truncated example lost its end, and with it
    the token that closes the answer. `repeated_questions` counts held-out examples whose question is also
    trained on: always 0 for a share, and worth a look where the held-out rows are files of their own.
    """

    fingerprint: str
    rows: int
    skipped: int
    skipped_reasons: dict[str, int]
    skipped_places: list[tuple[str, str]]
    max_tokens: int
    dropped: int
    truncated: int
    train_examples: int
    train_tokens: int
    train_learned_tokens: int
    held_out_examples: int
    held_out_tokens: int
    held_out_learned_tokens: int
    repeated_questions: int
    longest: int
    histogram: list[tuple[int, int]]

    @property
    def examples(self) -> int:
        return self.train_examples + self.held_out_examples

    @property
    def tokens(self) -> int:
        return self.train_tokens + self.held_out_tokens

    @property
    def learned_tokens(self) -> int:
        return self.train_learned_tokens + self.held_out_learned_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        totals = {"examples": self.examples, "tokens": self.tokens, "learned_tokens": self.learned_tokens}
        return asdict(self) | totals


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Counts of lengths in equal bins from 0 up, as (upper edge, examples with that length or less)."""
    longest = int(lengths.max(initial=1))
    # Edges that read well: a bin is 1, 2 or 5 times a power of ten.
    smallest = longest / HISTOGRAM_BINS
    power = 10 ** int(np.floor(np.log10(max(smallest, 1))))
    width = next(power * step for step in (1, 2, 5, 10) if power * step >= smallest)
    bins = -(-longest // width)
    counts = np.bincount((lengths - 1) // width, minlength=bins)
    return [((index + 1) * width, int(count)) for index, count in enumerate(counts)]
