"""Rows to token ids and masks, in threads or in worker processes, in the order of the rows."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.chat import Encoded, render_examples
from finetune.data.shapes import conversation, read_row
from finetune.data.split import question_key
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.chat import HarmonyEncoder, Segment
    from finetune.data.read import Row
    from finetune.recipe import DataSpec, Source

Batch = tuple["Source", list["Row"]]

# Large enough that passing a batch to a worker costs little beside its rows, small enough to bound memory: 64
# rows of 10,000 tokens each are 3 MB, and 25 MB while they are lists.
ROWS_PER_BATCH = 64
# While one thread renders, the tokenizer, which has threads of its own and needs no Python, encodes what the
# other has rendered. More would wait for Python's lock.
THREADS = 2
# Workers do the Python too; they pay where there are cores to spare, and more rows than one process is done
# with while they start and read a vocabulary of 200,000. Each takes 0.35 GB for that.
INLINE_BATCHES = 512
WORKERS = 4
# Batches ahead of the one that is waited for, for each thread or worker: these are what is in memory.
AHEAD = 3


@dataclass
class Chunk:
    """The examples of one batch of rows, end to end, and what became of the other rows.

    ids: int32 [tokens]; learn: uint8 [tokens]; lengths: int64 [examples]; keys: uint64 [examples], see
    `split`. `lowest_key` and `highest_key` are over all readable rows, dropped examples included.
    """

    rows: int
    ids: NDArray[np.int32]
    learn: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    keys: NDArray[np.uint64]
    lowest_key: int
    highest_key: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0


def render_row(row: Row, source: Source, spec: DataSpec) -> tuple[int, list[list[Segment]]]:
    """The question key and the examples of a row.

    Raises:
        FinetuneError: what is wrong with the row, at its place.
    """
    try:
        harmony = read_row(row, source)
        found = conversation(harmony, source, spec)
        return question_key(harmony), render_examples(found, learn=spec.learn, analysis=spec.analysis)
    except FinetuneError as error:
        raise FinetuneError(error.sentence, at=row.at) from None


def tokenise(rows: list[Row], source: Source, spec: DataSpec, encoder: HarmonyEncoder) -> Chunk:
    """Encode a batch of rows, with the recipe's choices about bad rows and long examples.

    Raises:
        FinetuneError: a bad row or a long example, where the recipe says stop.
    """
    examples: list[list[Segment]] = []
    origins: list[tuple[int, str]] = []
    skipped: list[tuple[str, str]] = []
    for row in rows:
        try:
            key, rendered = render_row(row, source, spec)
        except FinetuneError as error:
            if spec.bad_rows == "stop":
                raise
            skipped.append((row.at, error.sentence))
            continue
        examples += rendered
        origins += [(key, row.at)] * len(rendered)
    kept: list[tuple[int, Encoded]] = []
    truncated = 0
    for (key, at), example in zip(origins, encoder.encode_many(examples), strict=True):
        fitting = fit(example, spec, at)
        if fitting:
            kept.append((key, fitting))
            truncated += len(fitting.ids) < len(example.ids)
    return Chunk(
        rows=len(rows),
        ids=np.fromiter(itertools.chain.from_iterable(example.ids for _, example in kept), np.int32),
        learn=np.fromiter(itertools.chain.from_iterable(example.learn for _, example in kept), np.uint8),
        lengths=np.array([len(example.ids) for _, example in kept], dtype=np.int64),
        keys=np.array([key for key, _ in kept], dtype=np.uint64),
        lowest_key=min((key for key, _ in origins), default=2**64 - 1),
        highest_key=max((key for key, _ in origins), default=0),
        skipped=skipped,
        dropped=len(examples) - len(kept),
        truncated=truncated,
    )


def fit(example: Encoded, spec: DataSpec, at: str) -> Encoded | None:
    """The example within `data.max_tokens`; None when it is dropped.

    Truncation cuts the end, and with it the token that closes the answer: the model learns how the answer
    begins and not that it ends there. An example of which nothing learned would remain is dropped.

    Raises:
        FinetuneError: it is longer, and the recipe says stop.
    """
    limit = spec.max_tokens
    if len(example.ids) <= limit:
        return example
    if spec.too_long == "stop":
        raise FinetuneError(
            f"this conversation has {len(example.ids)} tokens and data.max_tokens is {limit}; "
            "raise data.max_tokens, or set data.too_long to drop or truncate",
            at=at,
        )
    if spec.too_long == "drop" or 1 not in example.learn[:limit]:
        return None
    return Encoded(example.ids[:limit], example.learn[:limit])


def batches(rows: Iterator[Row], source: Source) -> Iterator[Batch]:
    """The rows of a source in batches."""
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        yield source, batch


def tokenise_all(work: Iterator[Batch], spec: DataSpec, encoder: HarmonyEncoder) -> Iterator[Chunk]:
    """Encode batches, in order: in threads, and where there are many, after the first in workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = spec.workers or (WORKERS if cores >= WORKERS else 1)
    here = itertools.islice(work, INLINE_BATCHES if workers > 1 else None)
    job = partial(tokenise, spec=spec, encoder=encoder)
    yield from _in_order(ThreadPoolExecutor(THREADS), here, job, AHEAD * THREADS)
    if (first := next(work, None)) is None:
        return
    # Spawned, not forked: the trainer's process has threads and perhaps a CUDA context by now.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder.tokenizer.to_str(), spec),
    )
    try:
        yield from _in_order(pool, itertools.chain([first], work), _work, AHEAD * workers)
    except BrokenProcessPool:
        raise FinetuneError(
            "a worker process that prepares the data was ended from outside, most likely for lack of memory; "
            "data.workers: 1 prepares in one process"
        ) from None


def _in_order(
    pool: Executor, work: Iterator[Batch], job: Callable[[list[Row], Source], Chunk], ahead: int
) -> Iterator[Chunk]:
    """What `job` makes of each batch; the pool is done with when this ends, however it ends."""
    jobs = _submitted(pool, work, job)
    try:
        waiting = deque(itertools.islice(jobs, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(jobs, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(
    pool: Executor, work: Iterator[Batch], job: Callable[[list[Row], Source], Chunk]
) -> Iterator[Future[Chunk]]:
    try:
        for source, rows in work:
            yield pool.submit(job, rows, source)
    except FinetuneError as error:
        # A file that breaks off is read ahead of time: what is wrong in the rows before it comes first.
        broken: Future[Chunk] = Future()
        broken.set_exception(error)
        yield broken


_worker: tuple[HarmonyEncoder, DataSpec] | None = None


def _start_worker(tokenizer: str, spec: DataSpec) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that waits for us ends us
    from tokenizers import Tokenizer

    from finetune.chat import HarmonyEncoder

    _worker = HarmonyEncoder(Tokenizer.from_str(tokenizer)), spec


def _work(rows: list[Row], source: Source) -> Chunk:
    assert _worker, "the pool's initializer ran"
    encoder, spec = _worker
    return tokenise(rows, source, spec, encoder)
