"""Which sequences run, and how many tokens of each the next step computes.

Sequences join and leave between any two steps. A step takes one token of every sequence that has read its
prompt, and fills up with at most PREFILL_TOKENS of prompts that are still being read, so a long prompt delays
the others by a little at each step, and never for its whole length. Where pages run out, the sequence that
came last gives up its own and starts over later, with what it has written as part of its prompt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from finetune.serve.attention import Span
from finetune.serve.cache import PAGE_TOKENS, CacheSize, Pages
from finetune.serve.constrain import Constraint
from finetune.serve.sampling import Draws, Sampling, Scored

# Prompt tokens of one step: what a step with decoding alone takes is little changed by them on a GPU, and
# on a CPU others wait for tenths of a second at most.
PREFILL_TOKENS = 256

Ending = Literal["stop", "length", "failed"]


class Event(NamedTuple):
    """A token of an answer, its end, or both; `problem` says why an answer `failed`."""

    token: int | None
    scored: Scored | None = None
    ending: Ending | None = None
    problem: str | None = None


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been written to it, and where its keys and values are."""

    prompt: list[int]
    adapter: str | None
    sampling: Sampling
    sink: Callable[[Event], None]
    constraint: Constraint | None = None
    draws: Draws = field(init=False)
    ids: list[int] = field(init=False)
    computed: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    ring: int | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.draws = Draws(self.sampling)
        self.ids = list(self.prompt)

    @property
    def written(self) -> int:
        return len(self.ids) - len(self.prompt)


class Planned(NamedTuple):
    """Tokens of a sequence that the next step computes."""

    sequence: Sequence
    span: Span

    @property
    def ids(self) -> list[int]:
        return self.sequence.ids[self.span.start : self.span.start + self.span.length]

    @property
    def complete(self) -> bool:
        """Whether another token comes out."""
        return self.span.start + self.span.length == len(self.sequence.ids)


class Scheduler:
    """The waiting, the running, and the pages they hold; owned by the engine's thread."""

    def __init__(self, size: CacheSize) -> None:
        self.pages = Pages(size.pages)
        self._rings = Pages(size.sequences)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> list[Planned]:
        """The next step's work, single tokens first; room for it has been made."""
        self._admit()
        budget = PREFILL_TOKENS
        plan: list[Planned] = []
        for sequence in list(self.running):
            if sequence not in self.running:  # gave up its pages to an older one
                continue
            left = len(sequence.ids) - sequence.computed
            count = 1 if left == 1 else min(left, budget)
            if count and self._make_room(sequence, sequence.computed + count):
                budget -= count if left > 1 else 0
                assert sequence.ring is not None
                plan.append(Planned(sequence, Span(sequence.computed, count, sequence.pages, sequence.ring)))
        return sorted(plan, key=lambda item: item.span.length > 1)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _admit(self) -> None:
        """Start what waits, in its order, while there are rings, and pages for all prompts as a whole."""
        while self.waiting:
            first = self.waiting[0]
            if sum(map(_missing_pages, (*self.running, first))) > self.pages.count - self.pages.used:
                return
            ring = self._rings.take(1)
            if ring is None:
                return
            first.ring = ring[0]
            self.running.append(self.waiting.popleft())

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Give it pages for so many tokens, if need be those of younger ones; False: its own are gone."""
        missing = math.ceil(tokens / PAGE_TOKENS) - len(sequence.pages)
        while missing > 0:
            taken = self.pages.take(missing)
            if taken is not None:
                sequence.pages += taken
                return True
            youngest = self.running[-1]
            self._stop(youngest)
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.give_back(sequence.pages)
        if sequence.ring is not None:
            self._rings.give_back([sequence.ring])
        sequence.pages, sequence.ring, sequence.computed = [], None, 0


def _missing_pages(sequence: Sequence) -> int:
    """How many more the tokens that it has now will take."""
    return math.ceil(len(sequence.ids) / PAGE_TOKENS) - len(sequence.pages)
