from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.chat import ToolCall, read_conversation
from finetune.chat.parse import Completion, Part
from finetune.errors import FinetuneError
from finetune.evaluate.answers import Answer
from finetune.evaluate.prompts import Setting, read_prompts
from finetune.evaluate.tasks import Question, ask, grade, read_questions
from finetune.recipe import Task

USER = {"role": "user", "content": "How warm is Rome?"}
FINAL = {"role": "assistant", "thinking": "easy", "content": "20 degrees"}
RESULT = {"role": "tool", "content": "20"}


def called(city: str, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def asked(*messages: dict[str, Any], metric: Any = "exact_match") -> Question | None:
    return ask(read_conversation({"messages": list(messages)}), metric)


def completion(final: str = "", calls: tuple[ToolCall, ...] = (), thinking: str = "") -> Completion:
    parts = (Part(final, channel="final", closed_by="return"),) if final else ()
    return Completion((), thinking, final or "preamble", calls, "return", parts)


def test_the_last_answer_is_left_out_of_the_prompt_and_is_the_reference() -> None:
    question = asked(USER, FINAL, {"role": "user", "content": "And Oslo?"}, {**FINAL, "content": "5"})
    assert question is not None
    assert [message.role for message in question.prompt.messages] == ["user", "assistant", "user"]
    assert (question.reference, question.text) == ("5", "And Oslo?")


def test_a_text_after_tool_results_is_asked_with_the_results_shown() -> None:
    question = asked(USER, called("Rome"), RESULT, FINAL)
    assert question is not None
    assert [message.role for message in question.prompt.messages] == ["user", "assistant", "tool"]
    assert question.reference == "20 degrees"


def test_a_tool_call_is_asked_at_the_first_action_of_the_turn() -> None:
    question = asked(USER, called("Rome"), RESULT, FINAL, metric="tool_call")
    assert question is not None
    assert [message.role for message in question.prompt.messages] == ["user"]
    assert isinstance(question.reference, ToolCall)
    assert json.loads(question.reference.arguments) == {"city": "Rome"}


def test_actions_that_are_not_learned_are_shown_and_the_next_one_is_asked() -> None:
    question = asked(USER, called("Rome", learn=False), RESULT, called("Oslo"), metric="tool_call")
    assert question is not None
    assert len(question.prompt.messages) == 3
    assert isinstance(question.reference, ToolCall)
    assert "Oslo" in question.reference.arguments


def test_a_row_without_a_call_asks_for_none() -> None:
    question = asked(USER, FINAL, metric="tool_call")
    assert question is not None
    assert question.reference is None
    assert grade(completion("20 degrees"), question, "tool_call")


def test_a_row_without_an_answer_is_no_question() -> None:
    assert asked(USER) is None
    assert asked(USER, called("Rome")) is None


def test_only_the_final_message_counts_not_the_thinking_and_not_a_preamble() -> None:
    question = asked(USER, {**FINAL, "content": "preamble"})
    assert question is not None
    assert not grade(completion(thinking="preamble"), question, "exact_match")
    assert grade(completion("preamble "), question, "exact_match")


def test_an_answer_without_final_message_or_call_is_empty() -> None:
    assert Answer(completion(), 3, False).empty
    assert not Answer(completion("yes"), 3, False).empty
    assert not Answer(completion(calls=(ToolCall("weather", "{}"),)), 3, False).empty


def test_a_task_reads_its_file_and_keeps_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(5)))
    questions = read_questions(Task(name="t", path=str(file)), None, limit=2)
    assert [(question.text, question.reference) for question in questions] == [("0?", "0"), ("1?", "1")]


def test_a_task_without_any_answer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [USER]}) + "\n")
    with pytest.raises(FinetuneError, match="task 't' has no question"):
        read_questions(Task(name="t", path=str(file)), None)


def test_held_out_rows_need_a_run() -> None:
    with pytest.raises(FinetuneError, match="not a run"):
        read_questions(Task(name="t", path="held_out"), None)


def test_prompts_come_as_texts_lines_questions_and_rows_whose_answer_is_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"question": "two", "answer": "x"}, {"messages": [USER, FINAL]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.txt").write_text("three\n\nfour\n")
    setting = Setting(system="Be brief.", effort="high")
    prompts = read_prompts(["zero"], tmp_path / "rows.jsonl", setting)
    assert [prompt.messages[-1].content for prompt in prompts] == ["zero", "one", "two", "How warm is Rome?"]
    assert {prompt.messages[0].content for prompt in prompts} == {"Be brief."}
    assert {prompt.reasoning_effort for prompt in prompts} == {"high"}
    lines = read_prompts([], tmp_path / "lines.txt", Setting())
    assert [line.messages[-1].content for line in lines] == ["three", "four"]


def test_a_prompt_row_that_asks_nothing_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"messages": [FINAL]}) + "\n")
    with pytest.raises(FinetuneError, match=r"rows\.jsonl:2: "):
        read_prompts([], file, Setting())


def test_tools_for_a_chat_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": {"name": "weather"}}]))
    assert Setting.read(None, None, file).conversation("hi").tools[0].name == "weather"
    file.write_text('{"name": 3')
    with pytest.raises(FinetuneError, match=r"tools\.json: "):
        Setting.read(None, None, file)
