"""Tokenised examples, read from memory-mapped files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Example:
    """One training example. ids: int32 [L]; learn: uint8 [L], 1 where the token is learned; never at position
    0.
    """

    ids: NDArray[np.int32]
    learn: NDArray[np.uint8]


class Examples:
    """A selection of the examples in a pair of flat arrays; indexing copies nothing.

    ids: int32 [all tokens]; learn: uint8 [all tokens]; offsets: int64 [stored examples + 1], where each
    begins; chosen: int64 [len(self)], which of the stored examples these are.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        learn: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._ids, self._learn, self._offsets = ids, learn, offsets
        self._chosen = np.arange(len(offsets) - 1) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        place = self._chosen[index]
        start, end = self._offsets[place], self._offsets[place + 1]
        return Example(self._ids[start:end], self._learn[start:end])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 [len(self)]."""
        return np.diff(self._offsets)[self._chosen]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def learned_tokens(self) -> int:
        # Summed example by example: a selection of flat ranges, without a copy of all of them.
        return sum(int(example.learn.sum()) for example in self)

    def select(self, chosen: NDArray[np.int64]) -> Examples:
        """Those at the positions `chosen` of this selection, in that order."""
        return Examples(self._ids, self._learn, self._offsets, self._chosen[chosen])
