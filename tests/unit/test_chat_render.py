"""What of a conversation is shown, and what of it is learned."""

from __future__ import annotations

import pytest

from finetune.chat import Conversation, Message, read_conversation, render_examples, render_prompt
from finetune.errors import FinetuneError
from tests.chat_kit import marked

Raw = dict[str, object]
ASK: Raw = {"role": "user", "content": "2+2?"}
SHOWN_ASK = "<|start|>user<|message|>2+2?<|end|>"
TURN: Raw = {"role": "assistant", "thinking": "Easy.", "content": "4"}
CALL: Raw = {
    "role": "assistant",
    "thinking": "Call.",
    "tool_calls": [{"id": "1", "name": "f", "arguments": {}}],
}
RESULT: Raw = {"role": "tool", "tool_call_id": "1", "content": "ok"}
SHOWN_CALL = (
    "<|channel|>analysis<|message|>Call.<|end|>"
    "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
)
SHOWN_RESULT = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>ok<|end|>"
SHOWN_TURN = (
    "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
)
HISTORY = "<|start|>assistant<|channel|>final<|message|>4<|end|>"


def conversation(*messages: Raw) -> Conversation:
    return read_conversation({"messages": messages})


def learned(*messages: Raw, **options: object) -> str:
    (example,) = render_examples(conversation(*messages), **options)  # type: ignore[arg-type]
    return marked(example)


def test_the_header_of_the_prompt_is_not_learned_and_those_the_model_writes_are() -> None:
    assert learned(ASK, TURN) == f"{SHOWN_ASK}<|start|>assistant«{SHOWN_TURN}»"


def test_after_a_tool_result_the_header_belongs_to_the_prompt_again() -> None:
    expected = f"{SHOWN_ASK}<|start|>assistant«{SHOWN_CALL}»{SHOWN_RESULT}<|start|>assistant«{SHOWN_TURN}»"
    assert learned(ASK, CALL, RESULT, TURN) == expected


def test_earlier_finished_turns_lose_their_thinking_and_are_closed_as_history() -> None:
    assert learned(ASK, TURN, ASK, TURN) == f"{SHOWN_ASK}{HISTORY}{SHOWN_ASK}<|start|>assistant«{SHOWN_TURN}»"
    call = SHOWN_CALL.removeprefix("<|channel|>analysis<|message|>Call.<|end|>")
    assert learned(ASK, CALL, RESULT, TURN, ASK, TURN).startswith(f"{SHOWN_ASK}{call}{SHOWN_RESULT}{HISTORY}")


def test_an_unfinished_earlier_turn_keeps_its_thinking() -> None:
    expected = f"{SHOWN_ASK}<|start|>assistant{SHOWN_CALL}{SHOWN_ASK}<|start|>assistant«{SHOWN_TURN}»"
    assert learned(ASK, CALL, ASK, TURN) == expected


def test_all_turns_gives_one_example_for_each_as_the_model_sees_it_then() -> None:
    whole = conversation(ASK, CALL, RESULT, TURN, ASK, TURN)
    first, second = render_examples(whole, learn="all_turns")
    assert [first] == render_examples(conversation(ASK, CALL, RESULT, TURN))
    assert [second] == render_examples(whole)


def test_each_example_begins_with_the_prompt_of_its_turn() -> None:
    messages = [ASK, CALL, RESULT, TURN, ASK, TURN]
    for example, stop in zip(
        render_examples(conversation(*messages), learn="all_turns"), (1, 5), strict=True
    ):
        prompt = render_prompt(conversation(*messages[:stop]))
        assert example[: len(prompt)] == prompt
        assert example[len(prompt)].learned


def test_final_only_shows_the_thinking_and_learns_the_answer() -> None:
    thinking = "<|channel|>analysis<|message|>Easy.<|end|>"
    answer = SHOWN_TURN.removeprefix(thinking)
    assert learned(ASK, TURN, learn="final_only") == f"{SHOWN_ASK}<|start|>assistant{thinking}«{answer}»"


def test_without_analysis_the_thinking_is_left_out() -> None:
    final = "<|channel|>final<|message|>4<|return|>"
    expected = (
        f"{SHOWN_ASK}<|start|>assistant«{SHOWN_CALL.split('<|end|><|start|>assistant')[1]}»{SHOWN_RESULT}"
    )
    assert learned(ASK, CALL, RESULT, TURN, analysis=False) == f"{expected}<|start|>assistant«{final}»"


def test_a_message_not_to_be_learned_is_shown() -> None:
    expected = f"{SHOWN_ASK}<|start|>assistant{SHOWN_CALL}{SHOWN_RESULT}<|start|>assistant«{SHOWN_TURN}»"
    assert learned(ASK, CALL | {"learn": False}, RESULT, TURN) == expected
    unlearned = f"<|start|>assistant{SHOWN_TURN.removesuffix('<|return|>')}<|end|>"
    expected = f"{SHOWN_ASK}<|start|>assistant«{SHOWN_CALL}»{SHOWN_RESULT}{unlearned}"
    assert learned(ASK, CALL, RESULT, TURN | {"learn": False}) == expected


def test_all_turns_leaves_out_turns_with_nothing_to_learn() -> None:
    whole = conversation(ASK, TURN | {"learn": False}, ASK, TURN)
    assert render_examples(whole, learn="all_turns") == render_examples(whole)


def test_content_before_calls_is_a_preamble_and_several_calls_are_one_run() -> None:
    calls = [{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": '{"a":1}'}]
    head = "<|start|>assistant to=functions."
    tail = "<|channel|>commentary <|constrain|>json<|message|>"
    expected = (
        f'<|channel|>commentary<|message|>Wait.<|end|>{head}f{tail}{{}}<|call|>{head}g{tail}{{"a":1}}<|call|>'
    )
    both: Raw = {"role": "assistant", "content": "Wait.", "tool_calls": calls}
    assert learned(ASK, both) == f"{SHOWN_ASK}<|start|>assistant«{expected}»"
    followed = learned(ASK, both, {"role": "assistant", "content": "4"})
    assert followed.endswith(f"{expected}<|start|>assistant<|channel|>final<|message|>4<|return|>»")


def test_what_comes_after_the_last_assistant_message_is_not_shown() -> None:
    assert learned(ASK, CALL, RESULT) == f"{SHOWN_ASK}<|start|>assistant«{SHOWN_CALL}»"
    assert learned(ASK, TURN, ASK) == learned(ASK, TURN)


def test_answers_in_a_row_are_turns_of_their_own() -> None:
    assert learned(ASK, TURN, TURN) == f"{SHOWN_ASK}{HISTORY}<|start|>assistant«{SHOWN_TURN}»"


def test_instructions_and_tools_share_the_first_developer_message() -> None:
    tools = [{"name": "f", "description": "Do it"}]
    rules: Raw = {"role": "system", "content": "Be brief."}
    shown = "# Tools\n\n## functions\n\nnamespace functions {\n\n"
    shown += "// Do it\ntype f = () => any;\n\n} // namespace functions"
    row: Raw = {"messages": [rules, ASK, rules | {"role": "developer"}, TURN], "tools": tools}
    text = marked(render_examples(read_conversation(row))[0])
    late = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
    first = f"<|start|>developer<|message|># Instructions\n\nBe brief.\n\n{shown}<|end|>"
    assert text.startswith(f"{first}{SHOWN_ASK}{late}<|start|>assistant«")
    text = marked(render_examples(read_conversation(row | {"messages": [ASK, TURN]}))[0])
    assert text.startswith(f"<|start|>developer<|message|>{shown}<|end|>{SHOWN_ASK}")


def test_empty_instructions_are_not_shown() -> None:
    assert learned({"role": "system", "content": ""}, ASK, TURN) == learned(ASK, TURN)


def test_a_user_with_a_name_is_shown_with_it() -> None:
    assert learned(ASK | {"name": "Ada"}, TURN).startswith("<|start|>user:Ada<|message|>")


def test_the_system_message_says_who_when_how_hard_and_where_calls_go() -> None:
    row = {
        "messages": [ASK],
        "tools": [{"name": "f"}],
        "reasoning_effort": "high",
        "current_date": "2025-08-05",
    }
    text = "".join(segment.text for segment in render_prompt(read_conversation(row)))
    assert text.startswith(
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-05\n\nReasoning: high\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.\n"
        "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
    )
    assert "Current date" not in render_prompt(conversation(ASK))[3].text


def test_a_conversation_without_messages_can_still_be_prompted() -> None:
    assert marked(render_prompt(Conversation(()))) == "<|start|>assistant"


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([ASK], {}, "no assistant message"),
        ([ASK, TURN | {"learn": False}], {}, '"learn": false'),
        ([ASK, TURN, ASK, TURN | {"learn": False}], {}, '"learn": false'),
        ([ASK, CALL], {"learn": "final_only"}, "no final answer"),
        ([ASK, TURN | {"learn": False}], {"learn": "final_only"}, '"learn": false'),
    ],
)
def test_nothing_to_learn_is_said(messages: list[Raw], options: Raw, reason: str) -> None:
    with pytest.raises(FinetuneError, match=reason):
        learned(*messages, **options)


def test_tool_results_are_shown_under_the_name_given_in_python_too() -> None:
    messages = (Message("user", "2+2?"), Message("tool", "ok", name="f"))
    assert marked(render_prompt(Conversation(messages))) == f"{SHOWN_ASK}{SHOWN_RESULT}<|start|>assistant"
