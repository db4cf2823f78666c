"""Rows of every shape become the conversation that they mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.chat import Conversation, Message, ToolCall
from finetune.data import Row, row_to_conversation
from finetune.errors import FinetuneError
from finetune.recipe import DataSpec, Source
from tests.data_kit import chat

TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}


def read(value: dict[str, Any], data: dict[str, Any] | None = None, **source: Any) -> Conversation:
    found = Source(path="rows.jsonl", **source)
    return row_to_conversation(Row(value, "rows.jsonl:7", 7), found, DataSpec(train=[found], **(data or {})))


def messages(value: dict[str, Any], **source: Any) -> tuple[Message, ...]:
    return read(value, **source).messages


def error_of(value: dict[str, Any], **source: Any) -> str:
    with pytest.raises(FinetuneError) as caught:
        read(value, **source)
    return str(caught.value)


ASKED = (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize(
    "value",
    [
        chat("q", "a"),
        {"conversations": chat("q", "a")["messages"]},
        {"messages": json.dumps(chat("q", "a")["messages"])},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"question": "q", "answer": "a"},
    ],
)
def test_the_keys_of_a_row_tell_its_shape(value: dict[str, Any]) -> None:
    assert messages(value) == ASKED


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: "<think>" not in t))
def test_text_arrives_as_it_is_in_every_shape(text: str) -> None:
    rows: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]},
        {"prompt": text, "completion": text},
        {"instruction": text, "output": text},
    ]
    for row in rows:
        assert messages(row) == (Message("user", text), Message("assistant", text))
    assert messages({"question": text, "answer": "a"})[0].content == text


def test_sharegpt_calls_and_observations_become_tool_calls_and_results() -> None:
    call = json.dumps({"name": "add", "arguments": {"x": 1}})
    turns = [("human", "q"), ("function_call", call), ("observation", "2"), ("gpt", "a")]
    value = {
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        "tools": json.dumps([TOOL]),
    }
    conversation = read(value)
    assert [tool.name for tool in conversation.tools] == ["add"]
    assert conversation.messages == (
        Message("user", "q"),
        Message("assistant", tool_calls=(ToolCall("add", '{"x": 1}'),)),
        Message("tool", "2", name="add"),
        Message("assistant", "a"),
    )


def test_several_sharegpt_calls_in_one_turn_are_several_calls() -> None:
    calls = json.dumps([{"name": "add", "arguments": {}}, {"name": "sub", "arguments": {}}])
    turns = [
        ("human", "q"),
        ("function_call", calls),
        ("observation", "1"),
        ("observation", "2"),
        ("gpt", "a"),
    ]
    value = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    found = messages(value | {"tools": [TOOL, {"name": "sub"}]})
    assert [call.name for call in found[1].tool_calls] == ["add", "sub"]
    assert [message.name for message in found[2:4]] == ["add", "sub"]
    with pytest.raises(FinetuneError, match="calls 'add', and the row has no tools; list it there"):
        messages(value)


def test_alpaca_joins_instruction_and_input_and_shows_the_history_first() -> None:
    value = {"instruction": "q", "input": "i", "output": "a", "history": [["h", "r"]], "system": "s"}
    assert messages(value) == (
        Message("developer", "s"),
        Message("user", "h"),
        Message("assistant", "r"),
        Message("user", "q\ni"),
        Message("assistant", "a"),
    )


def test_columns_give_the_rows_names_to_ours() -> None:
    value = {"problem": "q", "solution": "t", "answer": "a", "level": 3}
    columns = {"question": "problem", "thinking": "solution", "answer": "answer"}
    assert messages(value, columns=columns) == (Message("user", "q"), Message("assistant", "a", "t"))


def test_a_mapped_column_hides_one_that_already_has_our_name() -> None:
    value = {"question": "old", "query": "q", "answer": "a"}
    assert messages(value, columns={"question": "query"}) == ASKED


def test_a_mapped_column_may_be_null_where_the_shape_does_not_need_it() -> None:
    columns = {"question": "problem", "thinking": "solution"}
    assert messages({"problem": "q", "solution": None, "answer": "a"}, columns=columns) == ASKED


def test_the_answer_behind_the_mark_of_gsm8k_is_final_and_the_text_before_it_thinking() -> None:
    assert messages({"question": "q", "answer": "3 + 4\n= 7\n#### -1,007"}) == (
        Message("user", "q"),
        Message("assistant", "-1,007", "3 + 4\n= 7"),
    )


def test_the_mark_of_gsm8k_is_text_where_it_is_not_the_last_line_or_no_number_follows() -> None:
    for answer in ("#### 7", "a\n#### 7\nb", "a\n#### Summary"):
        assert messages({"question": "q", "answer": answer})[1] == Message("assistant", answer)


def test_gsm8k_answers_stay_one_text_as_prompt_and_completion() -> None:
    value = {"question": "q", "answer": "3 + 4\n#### 7"}
    columns = {"prompt": "question", "completion": "answer"}
    assert messages(value, columns=columns, shape="prompt_completion")[1].content == "3 + 4\n#### 7"


def test_think_tags_in_front_of_an_answer_are_thinking() -> None:
    for text in ("<think>t</think>a", "<think>\nt\n</think>\n\na"):
        found = messages({"prompt": "q", "completion": text})
        assert found == (Message("user", "q"), Message("assistant", "a", "t"))


def test_think_tags_stay_text_in_messages_which_have_a_key_for_thinking() -> None:
    assert messages(chat("q", "<think>t</think>a"))[1].content == "<think>t</think>a"


def test_the_system_text_of_a_source_stands_in_front_of_the_rows_own() -> None:
    own = {"role": "system", "content": "own"}
    parts = {"role": "system", "content": [{"type": "text", "text": "own"}]}
    assert messages(chat("q", "a"), system="ours")[0] == Message("developer", "ours")
    for first in (own, parts):
        row = {"messages": [first, *chat("q", "a")["messages"]]}
        assert messages(row, system="ours")[0] == Message("system", "ours\n\nown")


def test_effort_and_date_of_the_recipe_stand_in_where_the_row_has_none() -> None:
    data = {"reasoning_effort": "high", "current_date": "2025-01-01"}
    assert read(chat("q", "a"), data).reasoning_effort == "high"
    row = {"question": "q", "answer": "a", "reasoning_effort": "low", "current_date": "2026-02-02"}
    conversation = read(row, data)
    assert (conversation.reasoning_effort, conversation.current_date) == ("low", "2026-02-02")


@pytest.mark.parametrize(
    ("value", "source", "said"),
    [
        (
            {"text": "x", "id": 1},
            {},
            "cannot tell the shape of this row from its keys (text, id); known are messages",
        ),
        ({}, {}, "cannot tell the shape of this row from its keys (no keys)"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {},
            "this row compares a chosen with a rejected answer",
        ),
        ({"question": "q"}, {"shape": "question_answer"}, "this row has no answer; it has question"),
        ({"q": 1}, {"columns": {"question": "Q"}}, "there is no column 'Q' for question; this row has q"),
        ({"question": ["q"], "answer": "a"}, {}, "question must be text"),
        ({"messages": "hello"}, {}, "messages must be a list or the JSON text of one"),
        ({"messages": {}}, {}, "messages must be a list"),
        ({"messages": None}, {"shape": "messages"}, "messages is null in this row"),
        ({"q": 1}, {"columns": {"qestion": "q"}}, "columns: we have no name 'qestion'; known are messages, "),
        ({"messages": []}, {}, "the row has no messages"),
        ({"conversations": [{"from": "human"}]}, {}, "turn 1 must be an object with from and value"),
        (
            {"conversations": [{"from": "cat", "value": "x"}]},
            {},
            "turn 1 is from 'cat'; known are human, user",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            {},
            "turn 1: a function_call must be JSON with name and arguments",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            {},
            "history must be a list of [question, answer]",
        ),
        ({"messages": [{"role": "cat", "content": "x"}]}, {}, "message 1 has the unknown role 'cat'"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_place(
    value: dict[str, Any], source: dict[str, Any], said: str
) -> None:
    assert error_of(value, **source).startswith(f"rows.jsonl:7: {said}")


keys = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "output", "question"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(keys | st.just("answer") | st.just("history"), values, max_size=4))
def test_any_row_at_all_is_read_or_refused_in_a_sentence(value: dict[str, Any]) -> None:
    try:
        read(value)
    except FinetuneError as error:
        assert error.at == "rows.jsonl:7" and "\n" not in error.sentence
