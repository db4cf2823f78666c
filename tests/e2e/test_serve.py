"""The server as OpenAI's own client sees it, on nano and adapters of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from finetune.chat import Conversation, Message
from tests.checkpoints import NANO
from tests.export_kit import write_adapter
from tests.serve_kit import ANSWER, WEATHER, Running, running

QUESTION: list[Any] = [{"role": "user", "content": "What is 347 plus 86?"}]
TOOL: Any = {"type": "function", "function": WEATHER}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not (NANO / "config.json").is_file():
        pytest.skip("the bundled model is not there")
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "one", NANO, targets=["attention", "experts", "router"], size=0.3)
    write_adapter(folder / "two", NANO, targets=["experts"], size=0.4)
    with running("nano", {"one": folder / "one", "two": folder / "two"}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def ask(client: openai.OpenAI, model: str = "nano", **options: Any) -> Any:
    settings = {"messages": QUESTION, "temperature": 0, "max_tokens": 120, **options}
    return client.chat.completions.create(model=model, **settings)


def test_a_chat_is_answered_with_thinking_apart_and_tokens_counted(
    client: openai.OpenAI, server: Running
) -> None:
    answer = ask(client)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("433", "stop")
    assert "7+6=13" in message.reasoning_content and message.tool_calls is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert answer.system_fingerprint == server.service.fingerprint("nano")


def test_a_stream_says_in_pieces_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    thinking = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thinking == whole.choices[0].message.reasoning_content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_effort_changes_how_much_is_thought(client: openai.OpenAI) -> None:
    low, high = (ask(client, reasoning_effort=effort) for effort in ("low", "high"))
    assert low.choices[0].message.content == high.choices[0].message.content == "433"
    thought = [answer.usage.completion_tokens_details.reasoning_tokens for answer in (low, high)]
    assert thought[0] < thought[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather in Oslo, please."}]
    answer = ask(client, messages=messages, tools=[TOOL], stream=stream)
    message = _from_stream(answer) if stream else answer.choices[0].message.model_dump(exclude_none=True)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"sky": "rainy", "degrees": 7}'}
    messages += [message, result]
    after = ask(client, messages=messages, tools=[TOOL])
    assert after.choices[0].finish_reason == "stop" and "7 degrees" in after.choices[0].message.content


def _from_stream(chunks: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": "", "arguments": ""}}
    finish, thinking = None, ""
    for chunk in chunks:
        finish = chunk.choices[0].finish_reason or finish
        thinking += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        for part in chunk.choices[0].delta.tool_calls or []:
            call["id"] = part.id or call.get("id")
            call["function"]["name"] += part.function.name or ""
            call["function"]["arguments"] += part.function.arguments or ""
    assert finish == "tool_calls"
    return {"role": "assistant", "reasoning_content": thinking, "tool_calls": [call]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book_room"}}])
def test_a_tool_is_called_where_one_has_to_be(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    sizes = {"type": "object", "properties": {"beds": {"enum": [1, 2]}}, "required": ["beds"]}
    other = {"name": "book_room", "parameters": {**sizes, "additionalProperties": False}}
    tools = [TOOL, {"type": "function", "function": other}]
    # What nano would say of its own accord is a number.
    answer = ask(client, tools=tools, tool_choice=choice, stream=stream, max_tokens=400)
    message = _from_stream(answer) if stream else answer.choices[0].message.model_dump()
    (call,) = message["tool_calls"]
    if choice != "required":
        assert call["function"]["name"] == "book_room"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments in ({"beds": 1}, {"beds": 2}) or isinstance(arguments["city"], str)


def test_strict_arguments_fit_and_nothing_forces_a_call(client: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**WEATHER, "strict": True}}
    assert ask(client, tools=[strict]).choices[0].message.content == "433"
    messages = [{"role": "user", "content": "Weather in Oslo, please."}]
    (call,) = ask(client, tools=[strict], messages=messages).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}


def test_tool_choice_none_hides_the_tools(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Weather in Oslo, please."}]
    with_tools = ask(client, messages=messages, tools=[TOOL])
    without = ask(client, messages=messages, tools=[TOOL], tool_choice="none")
    assert without.usage.prompt_tokens < with_tools.usage.prompt_tokens


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_in_json_fits_its_schema(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "result", "schema": ANSWER}}
    answer = ask(client, response_format=form, temperature=temperature, seed=3, max_tokens=400)
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content)
    assert isinstance(found["answer"], int) and isinstance(found["sure"], bool) and len(found) == 2


def test_json_object_gives_an_object_and_nothing_beside_it(client: openai.OpenAI) -> None:
    pieces = list(ask(client, response_format={"type": "json_object"}, stream=True, stop=["}"]))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text.startswith("{") and "}" not in text


def test_logprobs_are_those_of_the_content(client: openai.OpenAI, server: Running) -> None:
    scored = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in scored) == "433"
    for token in scored:
        assert bytes(token.bytes).decode() == token.token and len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0
    chunks = ask(client, logprobs=True, top_logprobs=3, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [(t.token, round(t.logprob, 4)) for t in streamed] == [
        (t.token, round(t.logprob, 4)) for t in scored
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, stop=["33", "zzz"], stream=stream)
    if not stream:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("4", "stop")
        return
    chunks = list(answer)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "4"


def test_max_tokens_cuts_the_answer_off(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=5)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5


def test_a_seed_gives_the_same_answer_whatever_else_is_answered(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        answer = ask(client, temperature=2, top_p=0.95, seed=seed, max_tokens=30)
        return str(answer.choices[0].message)

    alone = [drawn(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(drawn, range(6))) == alone
    assert len(set(alone)) > 1


def test_several_answers_are_those_of_one_seed_after_the_other(client: openai.OpenAI) -> None:
    options: Any = {"temperature": 2, "top_p": 0.95, "max_tokens": 12}
    several = ask(client, n=3, seed=5, **options)
    alone = [ask(client, seed=seed, **options) for seed in (5, 6, 7)]
    assert [c.message for c in several.choices] == [one.choices[0].message for one in alone]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, seed=5, stream=True, **options):
        (choice,) = chunk.choices
        streamed[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
    assert streamed == [getattr(c.message, "reasoning_content", None) or "" for c in several.choices]
    texts = client.completions.create(model="nano", prompt=["a", "b"], n=2, max_tokens=2, seed=1)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]


def test_penalties_and_biases_change_what_is_written(client: openai.OpenAI, server: Running) -> None:
    (four,) = server.service.encoder.encode_text("4")
    assert "4" not in ask(client, logit_bias={str(four): -100}).choices[0].message.content
    options: Any = {"model": "nano", "prompt": "la la la la la la", "temperature": 0, "max_tokens": 30}

    def different_tokens(**penalties: Any) -> int:
        answer: Any = client.completions.create(logprobs=0, **options, **penalties)
        return len(set(answer.choices[0].logprobs.tokens))

    assert different_tokens(frequency_penalty=2, presence_penalty=2) > different_tokens()


def test_every_model_is_listed_and_answers_by_its_name(client: openai.OpenAI, server: Running) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["one", "two", "nano"]
    assert [model.model_extra["parent"] for model in listed] == ["nano", "nano", None]  # type: ignore[index]
    assert client.models.retrieve("two").id == "two"
    texts = {model: ask(client, model).choices[0].message for model in ("one", "two", "nano")}
    assert len({str(message) for message in texts.values()}) == 3
    assert len({server.service.fingerprint(name) for name in texts}) == 3


def test_completions_go_on_from_texts_and_from_ids(client: openai.OpenAI, server: Running) -> None:
    encoder = server.service.encoder
    ids = encoder.prompt_ids(Conversation((Message("user", "What is 3 + 4?"),)))
    options: Any = {"model": "nano", "temperature": 0, "logprobs": 2}
    answer = client.completions.create(prompt=encoder.decode(ids), max_tokens=60, **options)
    assert answer.choices[0].text.endswith("<|channel|>final<|message|>7")
    assert answer.usage.prompt_tokens == len(ids)
    scored: Any = answer.choices[0].logprobs
    assert (
        "".join(scored.tokens) == answer.choices[0].text
        and scored.text_offset[-1] == len(answer.choices[0].text) - 1
    )
    both = client.completions.create(prompt=[ids, ids[:3]], max_tokens=4, **options)
    assert [choice.index for choice in both.choices] == [0, 1]
    alone = client.completions.create(prompt=ids, max_tokens=4, **options)
    assert both.choices[0].text == alone.choices[0].text
    chunks = client.completions.create(prompt=[ids, ids[:3]], max_tokens=4, stream=True, **options)
    streamed = {0: "", 1: ""}
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in both.choices]


def test_responses_are_items_and_their_stream_ends_in_the_same(client: openai.OpenAI) -> None:
    options: Any = {"model": "nano", "input": "What is 347 plus 86?", "temperature": 0}
    response = client.responses.create(**options)
    assert response.output_text == "433" and response.status == "completed"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    events = list(client.responses.create(stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "433"
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == "433"
    assert last.response.usage == response.usage


def test_responses_call_tools_and_take_their_results(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER}
    asked: list[Any] = [{"role": "user", "content": "Weather in Oslo, please."}]
    options: Any = {"model": "nano", "tools": [tool], "temperature": 0}
    with client.responses.stream(input=asked, **options) as stream:
        response: Any = stream.get_final_response()
    call = response.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call", "get_weather", {"city": "Oslo"},
    )  # fmt: skip
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"sky": "sunny", "degrees": 9}',
    }
    items = [item.model_dump(exclude_none=True) for item in response.output]
    asked += [*items, result]
    after = client.responses.create(input=asked, **options)
    assert "9 degrees" in after.output_text


def test_responses_honour_schema_limit_and_logprobs(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "result", "schema": ANSWER}}
    options: Any = {"model": "nano", "input": "What is 3 + 4?", "temperature": 0}
    assert json.loads(client.responses.create(text=form, **options).output_text).keys() == {"answer", "sure"}
    cut = client.responses.create(max_output_tokens=5, **options)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    scored = client.responses.create(include=["message.output_text.logprobs"], top_logprobs=2, **options)
    content: Any = scored.output[-1]
    assert [token.token for token in content.content[0].logprobs] == ["7"]


def test_thirty_two_clients_are_answered_at_once_each_by_its_own_model(client: openai.OpenAI) -> None:
    def sum_of(number: int) -> str:
        messages: list[Any] = [{"role": "user", "content": f"What is {number} plus 86?"}]
        return str(ask(client, "nano", messages=messages).choices[0].message.content)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(sum_of, range(101, 133)))
    right = sum(answer == str(number + 86) for number, answer in zip(range(101, 133), answers, strict=True))
    assert right >= 30  # nano itself gets one in a hundred wrong
