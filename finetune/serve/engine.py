"""The one thread that runs the model: plans a step, computes it, chooses tokens, tells those who wait."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from finetune.errors import FinetuneError, sentence_of
from finetune.model import keep_decoded
from finetune.serve.runner import Runner, Work
from finetune.serve.sampling import choose, score
from finetune.serve.scheduler import Ending, Event, Planned, Scheduler, Sequence

logger = logging.getLogger(__name__)


class QueueFull(FinetuneError):
    """As many requests wait as may."""


class Engine:
    """Answers sequences together. `submit` and `cancel` may be called from any thread.

    A sequence's sink is called in the engine's thread, or, with `post`, wherever that carries a step's calls.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        queue: int,
        post: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self.runner = runner
        self.post = post
        self._queue = queue
        self._scheduler = Scheduler(runner.cache.size)
        self._arrived: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._cancelled: list[Sequence] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in; what still runs is told that it failed."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._arrived) + len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def cache_use(self) -> float:
        """The share of the pages that is taken."""
        return self._scheduler.pages.used / self._scheduler.pages.count

    def submit(self, *sequences: Sequence) -> None:
        """Put the sequences of one request in the queue: all, if there is room for the first.

        Raises:
            QueueFull: as many wait as may.
        """
        with self._wake:
            if self.waiting >= self._queue:
                raise QueueFull(f"{self._queue} requests wait already; try again in a moment")
            self._arrived.extend(sequences)
            self._wake.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence, whose place is free after the step that runs; its sink is not called for it."""
        with self._wake:
            sequence.cancelled = True
            self._cancelled.append(sequence)
            self._wake.notify()

    def _run(self) -> None:
        # The server's other threads need a core too; where they take one of the model's, all of those wait.
        torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) - 1)))
        with keep_decoded(self.runner.model):
            while self._take_in():
                self._step()
        problem = "the server is shutting down"
        left = [*self._scheduler.running, *self._scheduler.waiting, *self._arrived]
        self._tell([(sequence, Event(None, ending="failed", problem=problem)) for sequence in left])

    def _step(self) -> None:
        events: list[tuple[Sequence, Event]] = []
        # One model call an adapter; the sort is stable, so single tokens stay before chunks.
        by_adapter = sorted(self._scheduler.plan(), key=lambda item: item.sequence.adapter or "")
        for _, group in groupby(by_adapter, key=lambda item: item.sequence.adapter):
            events += self._compute(list(group))
        self._tell(events)

    def _take_in(self) -> bool:
        """Wait for work, take what has arrived, drop what was cancelled; False when it is time to end."""
        with self._wake:
            idle = not (self._scheduler.running or self._scheduler.waiting)
            while idle and not (self._arrived or self._cancelled or self._stopping):
                self._wake.wait()
            while self._arrived:
                self._scheduler.add(self._arrived.popleft())
            for sequence in self._cancelled:
                self._scheduler.finish(sequence)
            self._cancelled.clear()
            return not self._stopping

    def _compute(self, group: list[Planned]) -> list[tuple[Sequence, Event]]:
        """One model call, and what to tell of it. An error ends these sequences, not the engine."""
        try:
            work = [Work(item.ids, item.span) for item in group]
            logits = self.runner.step(group[0].sequence.adapter, work)
            return self._choose(group, logits)
        except Exception as error:
            logger.exception("a step failed")
            for item in group:
                self._scheduler.finish(item.sequence)
            event = Event(None, ending="failed", problem=sentence_of(error))
            return [(item.sequence, event) for item in group]

    @torch.inference_mode()
    def _choose(self, group: list[Planned], logits: Tensor) -> list[tuple[Sequence, Event]]:
        """The next token of each sequence that is up to date; `logits [len(group), V]`."""
        for item in group:
            item.sequence.computed += item.span.length
        rows = [row for row, item in enumerate(group) if item.complete and not item.sequence.cancelled]
        sequences = [group[row].sequence for row in rows]
        logits = logits[rows]
        masks = [sequence.constraint.allowed() if sequence.constraint else None for sequence in sequences]
        tokens = choose(logits, [sequence.draws for sequence in sequences], masks)
        events: list[tuple[Sequence, Event]] = []
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if sequence.constraint is not None:
                sequence.constraint.accept(token)
            sequence.draws.wrote(token)
            sequence.ids.append(token)
            ending = _ending(sequence, token)
            if ending:
                self._scheduler.finish(sequence)
            events.append((sequence, Event(token, score(logits[row], token, sequence.sampling), ending)))
        return events

    def _tell(self, events: list[tuple[Sequence, Event]]) -> None:
        def call() -> None:
            for sequence, event in events:
                sequence.sink(event)

        if not events:
            return
        if self.post is None:
            call()
        else:
            self.post(call)


def _ending(sequence: Sequence, token: int) -> Ending | None:
    if token in sequence.sampling.stop_ids:
        return "stop"
    return "length" if sequence.written >= sequence.sampling.max_tokens else None
