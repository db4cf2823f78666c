"""Rows in the shape of OpenAI's chat API are read as their authors mean them, or refused with the reason."""

from __future__ import annotations

import json

import pytest

from finetune.chat import Message, Tool, ToolCall, read_conversation
from finetune.errors import FinetuneError

ASK = {"role": "user", "content": "hi"}


def read(*messages: object, **row: object) -> tuple[Message, ...]:
    return read_conversation({"messages": list(messages), **row}).messages


def calling(*calls: dict[str, object], **more: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": list(calls), **more}


def test_the_row_wins_over_the_recipe_and_unknown_keys_and_nulls_are_ignored() -> None:
    row = {"id": 7, "messages": [ASK | {"name": None, "tool_calls": None, "thinking": None}], "tools": None}
    assert read_conversation(row).reasoning_effort == "medium"
    filled = read_conversation(row, reasoning_effort="low", current_date="2025-01-01")
    assert (filled.reasoning_effort, filled.current_date) == ("low", "2025-01-01")
    own = read_conversation(
        row | {"reasoning_effort": "high", "current_date": "2024-01-01"},
        reasoning_effort="low",
        current_date="2025-01-01",
    )
    assert (own.reasoning_effort, own.current_date) == ("high", "2024-01-01")
    assert own.messages == (Message("user", "hi"),)


@pytest.mark.parametrize("wrapped", [True, False])
def test_tools_and_calls_are_read_with_and_without_the_function_wrapper(wrapped: bool) -> None:
    tool: dict[str, object] = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    call: dict[str, object] = {"name": "f", "arguments": {"a": "é"}}
    tools = [{"type": "function", "function": tool} if wrapped else tool]
    message = calling({"type": "function", "function": call} if wrapped else call)
    for given in (tools, json.dumps(tools)):
        conversation = read_conversation({"messages": [message], "tools": given})
        assert conversation.tools == (Tool("f", "d", {"type": "object"}),)
        assert conversation.messages[0].tool_calls == (ToolCall("f", '{"a": "é"}'),)


def test_arguments_as_text_are_kept_letter_by_letter() -> None:
    (message,) = read(calling({"name": "functions.f", "arguments": '{"a":  1}'}, {"name": "f"}))
    assert message.tool_calls == (ToolCall("f", '{"a":  1}'), ToolCall("f", "{}"))


def test_empty_tool_calls_are_none() -> None:
    (message,) = read(calling(content="4"))
    assert message == Message("assistant", "4")
    assert message.is_final


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_thinking_is_read_under_the_names_it_has_elsewhere(key: str) -> None:
    assert read({"role": "assistant", "content": "4", key: "hm"})[0].thinking == "hm"
    assert read({"role": "assistant", "content": "4", key: ""})[0].thinking is None


def test_content_parts_are_joined_and_sorted_into_thinking_and_calls() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"role": "user", "content": parts})[0].content == "ab"
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    (message,) = read({"role": "assistant", "content": parts})
    assert (message.thinking, message.tool_calls) == ("hm", (ToolCall("f", "{}"),))


def test_openai_weights_and_legacy_functions_are_understood() -> None:
    legacy = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}"},
        "weight": 0,
    }
    call, result = read(legacy, {"role": "function", "name": "f", "content": "1"})
    assert (call.tool_calls, call.learn) == ((ToolCall("f", "{}"),), False)
    assert (result.role, result.name) == ("tool", "f")


def test_tool_results_find_their_call_by_id_by_name_or_by_order() -> None:
    calls = calling({"id": "1", "name": "f"}, {"id": "2", "name": "g"})
    by_id = read(calls, {"role": "tool", "tool_call_id": "2", "content": ""}, {"role": "tool", "content": ""})
    assert [message.name for message in by_id[1:]] == ["g", "f"]
    by_name = read(calls, {"role": "tool", "name": "functions.g", "content": ""})
    assert by_name[1].name == "g"
    # ids that start anew each round, and a call of an earlier round left open
    again = read(calls, {"role": "tool", "content": ""}, calls, {"role": "tool", "content": ""})
    assert [message.name for message in again if message.role == "tool"] == ["f", "f"]
    late = {"role": "tool", "tool_call_id": "1", "content": ""}
    next_round = read(calls, ASK, calling({"name": "h"}), late, {"role": "tool", "content": ""})
    assert [message.name for message in next_round[3:]] == ["f", "h"]
    same_ids = read(calls, ASK, calling({"id": "1", "name": "h"}), late, late | {"name": "f"})
    assert [message.name for message in same_ids[3:]] == ["h", "f"]
    in_two = read(calling({"name": "f"}), calling({"name": "g"}), *[{"role": "tool", "content": ""}] * 2)
    assert [message.name for message in in_two[2:]] == ["f", "g"]


TOOL: dict[str, object] = {"name": "f"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "the row has no messages"),
        ({"messages": []}, "the row has no messages"),
        ({"messages": "hi"}, "messages must be a list, not text"),
        ({"messages": ["hi"]}, "message 1 must be a mapping with role and content, not text"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no role"),
        ({"messages": [ASK, {"role": "bot", "content": ""}]}, "message 2 has the unknown role 'bot'"),
        ({"messages": [{"role": "user"}]}, r"message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text or a list of parts, not a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the model reads text only"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part of the content .* must be a mapping"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be text, not null"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half a character"),
        ({"messages": [{"role": "assistant"}]}, "neither content nor tool_calls"),
        ({"messages": [ASK | {"thinking": "x"}]}, "which only an assistant message can have"),
        ({"messages": [ASK | {"learn": True}]}, "which only an assistant message can have"),
        ({"messages": [ASK | {"learn": "no"}]}, "must be true or false, not text"),
        ({"messages": [ASK | {"weight": 0.5}]}, "it is 0 or 1"),
        ({"messages": [calling(content="x") | {"tool_calls": "f"}]}, "must be a list, not text"),
        ({"messages": [calling({"arguments": {}})]}, "tool call 1 of message 1 .* has no name"),
        ({"messages": [calling({"name": "a b"})]}, "a name that no header can carry"),
        ({"messages": [calling({"name": "f", "arguments": "{a"})]}, "is not JSON"),
        ({"messages": [calling({"name": "f", "arguments": "[1]"})]}, "must be a JSON object, not a list"),
        ({"messages": [calling({"name": "f", "arguments": 1})]}, "must be a JSON object, not a number"),
        (
            {"messages": [calling({"name": "g"})], "tools": [TOOL]},
            "calls 'g', which is not among its tools: f",
        ),
        ({"messages": [{"role": "tool", "content": ""}]}, "no such call is open"),
        ({"messages": [{"role": "tool", "content": "", "tool_call_id": "1"}]}, "answers the call '1'"),
        (
            {"messages": [calling(TOOL), {"role": "tool", "content": "", "name": "g"}]},
            "message 2 .* answers a call of 'g', and no such call is open",
        ),
        (
            {
                "messages": [
                    calling({"name": "f", "id": "1"}),
                    {"role": "tool", "content": "", "name": "g", "tool_call_id": "1"},
                ]
            },
            "answers the call '1' of 'g', and no such call is open",
        ),
        ({"messages": [ASK], "tools": {"f": 1}}, "tools must be a list, not a mapping"),
        ({"messages": [ASK], "tools": "[{"}, "tools is text, and not JSON"),
        ({"messages": [ASK], "tools": [{"type": "web_search"}]}, "only functions can be shown"),
        ({"messages": [ASK], "tools": [{"description": "x"}]}, "tool 1 has no name"),
        ({"messages": [ASK], "tools": [TOOL | {"parameters": "x"}]}, "must be a JSON schema, not text"),
        ({"messages": [ASK], "reasoning_effort": "max"}, "it is low, medium or high"),
        ({"messages": [ASK], "current_date": 2025}, "current_date must be text"),
    ],
)
def test_a_bad_row_is_refused_with_the_reason(row: dict[str, object], reason: str) -> None:
    with pytest.raises(FinetuneError, match=reason):
        read_conversation(row)
