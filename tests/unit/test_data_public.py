"""Public data sets are read as they are published."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from finetune.data import prepare_data, read_conversations
from finetune.errors import FinetuneError
from finetune.recipe import Source
from tests.data_kit import byte_encoder, recipe, threads, write_rows

SPEC = recipe("unused").data


def test_gsm8k_is_a_question_thinking_and_a_number(shared: Path) -> None:
    found = read_conversations(Source(path=str(shared / "data/gsm8k/test.jsonl")), SPEC)
    assert len(found) == 1319
    for conversation in found:
        question, answer = conversation.messages
        assert question.content and answer.thinking
        assert "####" not in answer.thinking
        float(answer.content.replace(",", ""))


def test_sharegpt_tool_data_keeps_every_call_and_result(shared: Path) -> None:
    file = shared / "data/llamafactory_demo/glaive_toolcall_en_demo.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    found = read_conversations(Source(path=str(file)), SPEC)
    assert len(found) == len(raw) == 300
    for row, conversation in zip(raw, found, strict=True):
        turns = [turn["from"] for turn in row["conversations"]]
        assert turns.count("observation") == sum(message.role == "tool" for message in conversation.messages)
        assert turns.count("function_call") == sum(
            len(message.tool_calls) for message in conversation.messages
        )
        assert len(json.loads(row["tools"])) == len(conversation.tools)


def test_reasoning_with_tools_in_typed_parts_is_thinking_and_calls(shared: Path) -> None:
    file = shared / "data/llamafactory_demo/reason_tool_use_demo_50.jsonl"
    found = read_conversations(Source(path=str(file)), SPEC)
    assistant = [message for one in found for message in one.messages if message.role == "assistant"]
    assert len(found) == 50
    assert all(message.thinking for message in assistant)
    assert sum(len(message.tool_calls) for message in assistant) == 68


def test_alpaca_rows_are_instruction_and_output(shared: Path) -> None:
    file = shared / "data/llamafactory_demo/identity.json"
    found = read_conversations(Source(path=str(file), system="Be polite."), SPEC)
    raw = json.loads(file.read_text(encoding="utf-8"))
    assert [one.messages[-1].content for one in found] == [row["output"] for row in raw]
    assert all(one.messages[0].content == "Be polite." for one in found)


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("math/math500_test.json", {"question": "problem", "thinking": "solution", "answer": "answer"}, 500),
        ("humaneval/HumanEval.jsonl.gz", {"prompt": "prompt", "completion": "canonical_solution"}, 164),
        ("llamafactory_demo/kto_en_demo.json", {}, 300),
    ],
)
def test_other_sets_are_read_with_columns(
    shared: Path, name: str, columns: dict[str, str], rows: int
) -> None:
    assert len(read_conversations(Source(path=str(shared / "data" / name), columns=columns), SPEC)) == rows


def test_preference_rows_are_refused_with_what_to_do(shared: Path) -> None:
    with pytest.raises(
        FinetuneError, match=r"dpo_en_demo\.json:2: this row compares a chosen with a rejected"
    ):
        read_conversations(Source(path=str(shared / "data/llamafactory_demo/dpo_en_demo.json")), SPEC)


def test_threads_of_conversation_trees_are_prepared_whole(shared: Path, tmp_path: Path) -> None:
    with (shared / "data/oasst/en_100_tree.jsonl").open(encoding="utf-8") as lines:
        trees = [json.loads(line)["prompt"] for line in lines]
    found = list(itertools.chain.from_iterable(threads(tree) for tree in trees))
    file = write_rows(tmp_path / "oasst.jsonl", [{"messages": thread} for thread in found])
    prepared = prepare_data(
        recipe(file, learn="all_turns", max_tokens=100_000), byte_encoder(), cache_dir=tmp_path / "cache"
    )
    answers = sum(message["role"] == "assistant" for thread in found for message in thread)
    assert prepared.report.rows == len(found) > 100
    assert prepared.report.examples == answers
