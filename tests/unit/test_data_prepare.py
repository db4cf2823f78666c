"""Prepared data: what is kept, what is counted, and what the recipe decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data import Prepared, held_out_conversations, prepare_data, read_conversations, tokenise
from finetune.errors import FinetuneError
from finetune.recipe import Source
from tests.data_kit import byte_encoder, chat, recipe, write_rows

ROWS = [chat(f"question {number}", f"answer {number}") for number in range(200)]


def prepare(train: Path | list[Any], tmp_path: Path, **data: Any) -> Prepared:
    return prepare_data(recipe(train, **data), byte_encoder(), cache_dir=tmp_path / "cache")


def texts(examples: Any) -> list[str]:
    return [byte_encoder().decode(example.ids.tolist()) for example in examples]


def test_examples_are_the_encoded_rows_in_order(tmp_path: Path) -> None:
    prepared = prepare(write_rows(tmp_path / "a.jsonl", ROWS[:20]), tmp_path, held_out=0.0)
    conversations = read_conversations(Source(path=str(tmp_path / "a.jsonl")), recipe("x").data)
    for example, conversation in zip(prepared.train, conversations, strict=True):
        (encoded,) = byte_encoder().examples(conversation)
        assert example.ids.tolist() == encoded.ids
        assert example.learn.tolist() == encoded.learn
        assert example.ids.dtype == np.int32 and example.learn.dtype == np.uint8


def test_worker_processes_give_the_same_examples_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, "broken", *ROWS])
    here = prepare(file, tmp_path, cache=False, bad_rows="skip", workers=1)
    monkeypatch.setattr(tokenise, "INLINE_BATCHES", 1)
    there = prepare(file, tmp_path, cache=False, bad_rows="skip", workers=2)
    assert texts(here.train) == texts(there.train)
    assert here.report == there.report


def test_a_bad_row_met_in_a_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, {"messages": []}])
    monkeypatch.setattr(tokenise, "INLINE_BATCHES", 1)
    with pytest.raises(FinetuneError, match=r"a.jsonl:201: the row has no messages"):
        prepare(file, tmp_path, workers=2)


def test_held_out_questions_are_not_trained_on_and_stay_when_rows_are_added(tmp_path: Path) -> None:
    few = prepare(write_rows(tmp_path / "a.jsonl", ROWS[:100]), tmp_path, held_out=0.2)
    many = prepare(write_rows(tmp_path / "b.jsonl", [*ROWS[100:], *ROWS, *ROWS]), tmp_path, held_out=0.2)
    assert 5 < len(few.held_out) < 40
    assert set(texts(few.held_out)) <= set(texts(many.held_out))
    assert set(texts(few.train)) <= set(texts(many.train))
    assert not set(texts(many.train)) & set(texts(many.held_out))


def test_held_out_conversations_are_those_that_prepare_holds_out(tmp_path: Path) -> None:
    for rows, data in ((ROWS, {"held_out": 0.1}), (ROWS[:3], {"held_out": 0.01}), (ROWS, {"held_out": 0.0})):
        file = write_rows(tmp_path / "a.jsonl", rows)
        found = held_out_conversations(recipe(file, **data))
        encoded = [byte_encoder().examples(conversation)[0].ids for conversation in found]
        assert encoded == [example.ids.tolist() for example in prepare(file, tmp_path, **data).held_out]
    assert len(held_out_conversations(recipe(file, held_out=0.5), limit=7)) == 7


def test_held_out_rows_may_be_files_of_their_own_and_repeated_questions_are_counted(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", ROWS[:10])
    apart = write_rows(tmp_path / "b.jsonl", ROWS[8:12])
    prepared = prepare(train, tmp_path, held_out=[{"path": str(apart)}])
    assert (len(prepared.train), len(prepared.held_out)) == (10, 4)
    assert prepared.report.repeated_questions == 2
    assert held_out_conversations(
        recipe(train, held_out=[{"path": str(apart)}]), limit=2
    ) == read_conversations(Source(path=str(apart), limit=2), recipe("x").data)


def test_all_turns_make_an_example_each_on_the_same_side(tmp_path: Path) -> None:
    rows = [{"messages": ROWS[i]["messages"] + ROWS[i + 1]["messages"]} for i in range(100)]
    prepared = prepare(write_rows(tmp_path / "a.jsonl", rows), tmp_path, learn="all_turns", held_out=0.3)
    assert prepared.report.examples == 200
    assert len(prepared.held_out) % 2 == 0


LONG = chat("long", "x" * 1000)


def test_a_long_conversation_stops_with_its_place_its_length_and_the_knobs(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [ROWS[0], LONG])
    with pytest.raises(FinetuneError) as caught:
        prepare(file, tmp_path, max_tokens=600)
    size = prepare(file, tmp_path, held_out=0.0).train.lengths[1]
    assert str(caught.value) == (
        f"{file}:2: this conversation has {size} tokens and data.max_tokens is 600; "
        "raise data.max_tokens, or set data.too_long to drop or truncate"
    )


def test_long_conversations_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [ROWS[0], LONG])
    prepared = prepare(file, tmp_path, max_tokens=600, too_long="drop", held_out=0.0)
    assert (len(prepared.train), prepared.report.dropped, prepared.report.truncated) == (1, 1, 0)


def test_truncation_cuts_the_end_and_drops_what_has_nothing_learned_left(tmp_path: Path) -> None:
    long_question = chat("x" * 1000, "a")
    file = write_rows(tmp_path / "a.jsonl", [LONG, ROWS[0], long_question])
    whole = prepare(file, tmp_path, held_out=0.0)
    cut = prepare(file, tmp_path, held_out=0.0, max_tokens=600, too_long="truncate")
    assert (cut.report.truncated, cut.report.dropped, len(cut.train)) == (1, 1, 2)
    assert cut.train[0].ids.tolist() == whole.train[0].ids[:600].tolist()
    assert cut.train[0].learn.any()
    assert byte_encoder().return_id not in cut.train[0].ids


def test_bad_rows_stop_or_are_skipped_and_counted_with_place_and_reason(tmp_path: Path) -> None:
    unlearned = {"messages": [{"role": "user", "content": "q"}]}
    file = write_rows(tmp_path / "a.jsonl", [ROWS[0], [1], unlearned, unlearned])
    with pytest.raises(FinetuneError, match=r"a\.jsonl:2: a row must be a JSON object, not a list"):
        prepare(file, tmp_path)
    report = prepare(file, tmp_path, bad_rows="skip").report
    reason = "the conversation has no assistant message to learn"
    assert (report.rows, report.skipped, report.examples) == (4, 3, 1)
    assert report.skipped_reasons == {"a row must be a JSON object, not a list": 1, reason: 2}
    assert report.skipped_places[1] == (f"{file}:3", reason)


def test_many_different_reasons_are_summed_up(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": f"role {number}", "content": "x"}]} for number in range(50)]
    report = prepare(write_rows(tmp_path / "a.jsonl", [ROWS[0], *rows]), tmp_path, bad_rows="skip").report
    assert sum(report.skipped_reasons.values()) == report.skipped == 50
    assert len(report.skipped_reasons) < 30 and len(report.skipped_places) < 30


def test_nothing_left_to_learn_from_is_an_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [LONG, {}])
    with pytest.raises(
        FinetuneError, match="no example is left to learn from: of 2 rows 1 were bad, and 1 examples"
    ):
        prepare(file, tmp_path, bad_rows="skip", max_tokens=600, too_long="drop")


def test_the_report_counts_tokens_and_lengths_and_is_json(tmp_path: Path) -> None:
    prepared = prepare(write_rows(tmp_path / "a.jsonl", ROWS), tmp_path, held_out=0.1)
    report = prepared.report
    assert (
        report.tokens
        == report.train_tokens + report.held_out_tokens
        == sum(len(example.ids) for part in (prepared.train, prepared.held_out) for example in part)
    )
    assert 0 < report.learned_tokens < report.tokens
    assert sum(count for _, count in report.histogram) == report.examples == report.rows == 200
    assert report.histogram[-1][0] >= report.longest > report.histogram[-2][0]
    assert json.loads(json.dumps(report.to_dict()))["tokens"] == report.tokens


def test_the_fingerprint_is_that_of_the_tokens(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ROWS)
    one = prepare(file, tmp_path).report.fingerprint
    same = prepare(write_rows(tmp_path / "b.jsonl", ROWS), tmp_path, workers=1, cache=False)
    assert same.report.fingerprint == one
    assert prepare(file, tmp_path, held_out=0.5).report.fingerprint != one
    assert prepare(file, tmp_path, reasoning_effort="high").report.fingerprint != one
    assert prepare(write_rows(file, ROWS[1:]), tmp_path).report.fingerprint != one
