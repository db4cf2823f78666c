"""A recipe's data, tokenised and split, from the cache where it is there."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.data import cache, split
from finetune.data.examples import Examples
from finetune.data.read import read_rows
from finetune.data.report import Counts, DataReport, histogram
from finetune.data.shapes import row_to_conversation
from finetune.data.tokenise import Chunk, batches, render_row, tokenise_all
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.chat import Conversation, HarmonyEncoder
    from finetune.recipe import DataSpec, Recipe, Source


@dataclass(frozen=True)
class Prepared:
    """The examples to learn from, those to measure on, and what became of the rows."""

    train: Examples
    held_out: Examples
    report: DataReport


Progress = Callable[[int, int], object]


def prepare_data(
    recipe: Recipe, encoder: HarmonyEncoder, *, cache_dir: Path, progress: Progress | None = None
) -> Prepared:
    """Tokenise the data of a recipe; memory stays bounded whatever its size.

    Everything is kept in `cache_dir` under a fingerprint of all it depends on, and read from there the next
    time; `data.cache: false` keeps nothing. Several processes may do this at once. `progress` is called with
    the rows and tokens of a set of sources so far, while it is tokenised.

    Raises:
        FinetuneError: data that is missing or not readable; a bad row or a long example where the recipe says
            stop; nothing left to learn from; no space on the disk.
    """
    spec = recipe.data
    stored = _stored(spec.train, spec, encoder, cache_dir, progress)
    counts, repeated = stored.counts, 0
    if isinstance(spec.held_out, list):
        apart = _stored(spec.held_out, spec, encoder, cache_dir, progress)
        counts = counts + apart.counts
        train, held = stored.examples, apart.examples
        repeated = int(np.isin(apart.keys, stored.keys).sum())
        split_by = apart.fingerprint
    else:
        bound = split.held_out_below(spec.held_out, counts.lowest_key, counts.highest_key)
        mask = stored.keys < np.uint64(bound)
        train = stored.examples.select(np.flatnonzero(~mask))
        held = stored.examples.select(np.flatnonzero(mask))
        split_by = str(bound)
    if not len(train):
        raise _nothing_left(spec.train, counts, spec)
    fingerprint = sha256(f"{stored.fingerprint} {split_by}".encode()).hexdigest()
    return Prepared(train, held, _report(fingerprint, spec, counts, train, held, repeated))


def _stored(
    sources: list[Source], spec: DataSpec, encoder: HarmonyEncoder, place: Path, progress: Progress | None
) -> cache.Stored:
    if not spec.cache:
        # On POSIX, files that are mapped stay readable after their names are gone.
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            return _made(Path(folder), "data", _chunks(sources, spec, encoder, progress))
    name = cache.entry_name(sources, spec, encoder)
    return cache.read(place / name) or _made(place, name, _chunks(sources, spec, encoder, progress))


def _nothing_left(sources: list[Source], counts: Counts, spec: DataSpec) -> FinetuneError:
    return FinetuneError(
        f"no example is left to learn from: of {counts.rows} rows {counts.skipped} were bad, "
        f"and {counts.dropped} examples were longer than data.max_tokens ({spec.max_tokens})",
        at=sources[0].path or sources[0].hub,
    )


def _made(place: Path, name: str, chunks: Generator[Chunk, None, None]) -> cache.Stored:
    # Left to its exception's traceback, the generator would end its threads when Python no longer can.
    with cache.new_entry(place, name) as folder, closing(chunks):
        cache.write(folder, chunks)
    stored = cache.read(place / name)
    if stored is None:
        raise FinetuneError(
            "the prepared data did not survive being written; is the disk sound?", at=str(place)
        )
    return stored


def _chunks(
    sources: list[Source], spec: DataSpec, encoder: HarmonyEncoder, progress: Progress | None
) -> Generator[Chunk, None, None]:
    work = (batches(read_rows(source, streaming=spec.streaming), source) for source in sources)
    rows = tokens = 0
    for chunk in tokenise_all(itertools.chain.from_iterable(work), spec, encoder):
        rows, tokens = rows + chunk.rows, tokens + len(chunk.ids)
        if progress:
            progress(rows, tokens)
        yield chunk


def _report(
    fingerprint: str, spec: DataSpec, counts: Counts, train: Examples, held: Examples, repeated: int
) -> DataReport:
    lengths = np.concatenate([train.lengths, held.lengths])
    return DataReport(
        fingerprint=fingerprint,
        rows=counts.rows,
        skipped=counts.skipped,
        skipped_reasons=counts.reasons,
        skipped_places=counts.places,
        max_tokens=spec.max_tokens,
        dropped=counts.dropped,
        truncated=counts.truncated,
        train_examples=len(train),
        train_tokens=train.tokens,
        train_learned_tokens=train.learned_tokens,
        held_out_examples=len(held),
        held_out_tokens=held.tokens,
        held_out_learned_tokens=held.learned_tokens,
        repeated_questions=repeated,
        longest=int(lengths.max()),
        histogram=histogram(lengths),
    )


def read_conversations(source: Source, spec: DataSpec) -> list[Conversation]:
    """The conversations of a source, in order; bad rows stop or are left out as `spec.bad_rows` says.

    Raises:
        FinetuneError: as `read_rows`, and for the first bad row where the spec says stop.
    """
    found = []
    for row in read_rows(source, streaming=spec.streaming):
        try:
            found.append(row_to_conversation(row, source, spec))
        except FinetuneError:
            if spec.bad_rows == "stop":
                raise
    return found


def held_out_conversations(recipe: Recipe, limit: int | None = None) -> list[Conversation]:
    """The first `limit` conversations that `prepare_data` holds out.

    Raises:
        FinetuneError: as `read_conversations`.
    """
    spec = recipe.data
    if isinstance(spec.held_out, list):
        found = (one for source in spec.held_out for _, one in _conversations(source, spec))
        return list(itertools.islice(found, limit))
    keys = [key for source in spec.train for key, _ in _conversations(source, spec)]
    if not keys:
        return []
    bound = split.held_out_below(spec.held_out, min(keys), max(keys))
    # Read again rather than kept: most of them are not held out, and they may not fit in memory.
    chosen = (one for source in spec.train for key, one in _conversations(source, spec) if key < bound)
    return list(itertools.islice(chosen, limit))


def _conversations(source: Source, spec: DataSpec) -> Iterator[tuple[int, Conversation]]:
    """The conversations with something to learn, and their question keys."""
    for row in read_rows(source, streaming=spec.streaming):
        try:
            key, _ = render_row(row, source, spec)
        except FinetuneError:
            if spec.bad_rows == "stop":
                raise
            continue
        yield key, row_to_conversation(row, source, spec)
