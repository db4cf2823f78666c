"""Rows tokenised in threads: what comes out is what row after row gives, and memory stays bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.chat import HarmonyEncoder
from finetune.data import read_rows, tokenise
from finetune.data.read import Row
from finetune.data.tokenise import AHEAD, ROWS_PER_BATCH, THREADS, Batch, Chunk, batches, tokenise_all
from finetune.errors import FinetuneError
from tests.conversations import rows
from tests.data_kit import byte_encoder, chat, recipe

SPEC = recipe("x", bad_rows="skip", too_long="drop", max_tokens=500).data
SOURCE = SPEC.train[0]
BAD: list[dict[str, Any]] = [{}, {"messages": []}]


def rows_of(values: list[dict[str, Any]]) -> Iterator[Row]:
    return (Row(value, f"a.jsonl:{number}", number) for number, value in enumerate(values, 1))


def joined(chunks: list[Chunk], name: str) -> Any:
    return np.concatenate([getattr(chunk, name) for chunk in chunks])


@settings(max_examples=20)
@given(values=st.lists(rows() | st.sampled_from(BAD), min_size=1, max_size=12), repeats=st.integers(1, 40))
def test_threads_give_what_one_row_after_the_other_gives(values: list[Any], repeats: int) -> None:
    values = values * repeats
    alone = [tokenise.tokenise([row], SOURCE, SPEC, byte_encoder()) for row in rows_of(values)]
    together = list(tokenise_all(batches(rows_of(values), SOURCE), SPEC, byte_encoder()))
    for name in ("ids", "learn", "lengths", "keys"):
        one, all_ = joined(alone, name), joined(together, name)
        assert one.dtype == all_.dtype and np.array_equal(one, all_)
    assert [place for chunk in alone for place in chunk.skipped] == [
        place for chunk in together for place in chunk.skipped
    ]
    assert sum(chunk.dropped for chunk in alone) == sum(chunk.dropped for chunk in together)


def test_only_a_few_batches_are_read_ahead_of_what_is_asked_for() -> None:
    read = 0

    def work() -> Iterator[Batch]:
        nonlocal read
        for batch in batches(rows_of([chat("q", "a")] * (ROWS_PER_BATCH * 50)), SOURCE):
            read += 1
            yield batch

    for asked, _ in enumerate(tokenise_all(work(), SPEC, byte_encoder()), 1):
        assert read <= asked + AHEAD * THREADS


def test_a_bad_row_is_named_before_the_place_where_the_file_breaks_off(tmp_path: Path) -> None:
    rows = [json.dumps({} if number == 8 else chat("q", "a")) for number in range(1, 101)]
    file = tmp_path / "a.json"
    file.write_text("[" + ",\n".join(rows) + "\n{}]")  # a comma is missing; that far is read ahead of time
    spec = recipe(file).data
    with pytest.raises(FinetuneError, match=r"a\.json:8: cannot tell the shape"):
        list(tokenise_all(batches(read_rows(spec.train[0]), spec.train[0]), spec, byte_encoder()))


def test_an_interruption_ends_the_threads_and_leaves_nothing_to_do() -> None:
    chunks = tokenise_all(batches(rows_of([chat("q", "a")] * 5000), SOURCE), SPEC, byte_encoder())
    next(chunks)
    with pytest.raises(KeyboardInterrupt):
        chunks.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert next(chunks, None) is None


def test_an_encoder_may_be_used_by_several_threads(shared: Path) -> None:
    encoder = HarmonyEncoder.from_dir(shared / "o200k")
    texts = [f"text {number} of many" for number in range(20_000)]  # more than are kept
    encoder.tokenizer.enable_truncation(2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder.encode_text, texts))
    assert found == [encoder.encode_text(text) for text in texts]
    assert min(map(len, found)) > 2
