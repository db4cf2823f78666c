"""Completions are read back as what was written, and garbage is read without an error."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.chat import (
    Conversation,
    Delta,
    Message,
    StreamParser,
    ToolCall,
    parse_completion,
    read_conversation,
    render_examples,
)
from finetune.chat.encode import HARMONY_TOKENS
from tests.chat_kit import byte_encoder
from tests.conversations import assistant_messages, texts

ENCODER = byte_encoder()
HEADER = "<|channel|>final<|message|>"


def ids_of(text: str) -> list[int]:
    """Token ids of text in which special tokens are meant."""
    ids: list[int] = []
    for piece in re.split(r"(<\|[a-z]+\|>)", text):
        special = ENCODER.tokenizer.token_to_id(piece) if piece in HARMONY_TOKENS else None
        ids += ENCODER.encode_text(piece) if special is None else [special]
    return ids


def written(message: Message) -> list[int]:
    """What the model writes to say `message`."""
    (example,) = ENCODER.encode_many(render_examples(Conversation((Message("user", "?"), message))))
    return [token for token, learned in zip(example.ids, example.learn, strict=True) if learned]


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(assistant_messages(["f", "math.factorial"]))
def test_what_was_rendered_is_parsed_back(raw: dict[str, object]) -> None:
    (message,) = read_conversation({"messages": [raw]}).messages
    message = replace(message, learn=None)
    completion = parse_completion(ENCODER, written(message))
    assert completion.messages == (message,)
    assert completion.thinking == (message.thinking or "")
    assert (completion.content, completion.tool_calls) == (message.content, message.tool_calls)
    assert completion.ended == ("call" if message.tool_calls else "return")


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(thinking=texts, content=texts)
def test_a_stream_gives_the_same_text_piece_by_piece(thinking: str, content: str) -> None:
    assume(thinking)
    parser = StreamParser(ENCODER)
    deltas = [
        delta for token in written(Message("assistant", content, thinking)) for delta in parser.feed(token)
    ]
    for channel, text in (("analysis", thinking), ("final", content)):
        assert "".join(delta.text for delta in deltas if delta.channel == channel) == text
    assert all(delta.text and "�" not in delta.text for delta in deltas if "�" not in thinking + content)
    completion = parser.finish()
    assert (completion.thinking, completion.content) == (thinking, content)


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(st.lists(st.sampled_from([*range(256, 264), 65, 66, 195, 255, 10**6, -1]), max_size=20))
def test_garbage_is_read_without_an_error_and_streams_alike(ids: list[int]) -> None:
    parser = StreamParser(ENCODER)
    for token in ids:
        parser.feed(token)
    completion = parser.finish()
    assert completion == parse_completion(ENCODER, ids)
    assert completion.ended in (None, "return", "call")


@pytest.mark.parametrize(
    ("text", "content", "ended"),
    [
        ("", "", None),
        ("<|return|>", "", None),
        ("Hello  there\n", "Hello  there", None),
        ("Hello<|return|>", "Hello", None),
        ("<|channel|>final", "", None),
        (f"{HEADER}4", "4", None),
        (f"{HEADER}4<|return|>", "4", "return"),
        (f"{HEADER}4<|return|><|endoftext|><|endoftext|>", "4", "return"),
        (f"{HEADER}4<|endoftext|>5", "4", None),
        (f"{HEADER}4<|return|>more", "4", None),
        (f"{HEADER}4<|return|>more<|return|>", "4", None),
        (f"{HEADER}4<|end|>more<|start|>assistant{HEADER}5<|return|>", "4\n5", "return"),
        (f"more<|end|><|start|>assistant{HEADER}4<|return|>", "4", "return"),
        ("<|message|>4<|return|>", "4", "return"),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}", "return"),
        ("<|channel|>commentary<|message|>Wait<|end|>", "Wait", None),
        ('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a', '{"a', None),
    ],
)
def test_what_is_not_harmony_becomes_content(text: str, content: str, ended: str | None) -> None:
    completion = parse_completion(ENCODER, ids_of(text))
    assert (completion.content, completion.ended, completion.tool_calls) == (content, ended, ())


def test_thinking_that_never_ends_is_thinking() -> None:
    completion = parse_completion(ENCODER, ids_of("<|channel|>analysis<|message|>hm, well"))
    assert (completion.thinking, completion.content, completion.ended) == ("hm, well", "", None)


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.f<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        " to=functions.f<|channel|>commentary json",
        "<|channel|>analysis to=functions.f code",
    ],
)
def test_a_call_is_read_wherever_the_header_names_its_tool(header: str) -> None:
    completion = parse_completion(ENCODER, ids_of(f"{header}<|message|>{{}}<|call|>"))
    assert (completion.tool_calls, completion.ended) == ((ToolCall("f", "{}"),), "call")


def test_several_messages_in_a_row_are_kept_apart() -> None:
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>c<|end|>"
        f"<|start|>assistant{HEADER}d<|return|>"
    )
    completion = parse_completion(ENCODER, ids_of(text))
    assert completion.messages == (Message("assistant", "c", "a\nb"), Message("assistant", "d"))
    assert (completion.thinking, completion.content) == ("a\nb", "d")
    assert [part.channel for part in completion.parts] == ["analysis", "analysis", "commentary", "final"]


def test_what_someone_else_is_made_to_say_is_no_call_of_the_assistant() -> None:
    text = f"{HEADER}a<|end|><|start|>functions.f to=assistant<|channel|>commentary<|message|>b<|end|>"
    completion = parse_completion(ENCODER, ids_of(text))
    assert (completion.content, completion.tool_calls) == ("a", ())


def test_a_character_of_several_tokens_streams_once_it_is_whole() -> None:
    parser = StreamParser(ENCODER)
    pieces = [parser.feed(token) for token in ids_of(f"{HEADER}é")]
    assert pieces[-2:] == [[], [Delta("final", None, "é")]]
    assert parser.feed(ENCODER.encode_text("é")[0]) == []
    assert parser.feed(ENCODER.return_id) == [Delta("final", None, "�")]
