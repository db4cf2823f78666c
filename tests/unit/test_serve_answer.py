"""Tokens to pieces: thinking, content and calls apart, stop strings, scores, answers held to JSON."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.chat import HarmonyEncoder, parse_completion
from finetune.errors import FinetuneError
from finetune.serve.answer import HarmonyReader, Piece, Reader, TextReader
from finetune.serve.api.completions import raw_ids
from finetune.serve.constrain import OBJECT, Constraint, Form, Grammars
from finetune.serve.harmony import Position
from finetune.serve.sampling import Scored
from finetune.serve.scheduler import Event
from tests.chat_kit import byte_encoder

ENCODER = byte_encoder()
THINKING = "<|channel|>analysis<|message|>thinking ü<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
CALL = "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>"


def read(reader: Reader, text: str, *, cut: bool = False) -> list[Piece]:
    """The pieces of a completion written out, up to where the reader has had enough."""
    ids = raw_ids(ENCODER, text)
    pieces: list[Piece] = []
    for token, following in pairwise([*ids, None]):
        assert token is not None
        last = following is None
        ending: Any = None if not last else "length" if cut else "stop"
        pieces += reader.feed(Event(token, Scored(-0.5, []), ending))
        if reader.finish is not None:
            break
    return pieces


def said(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def test_thinking_content_and_calls_come_apart() -> None:
    reader = HarmonyReader(ENCODER)
    pieces = read(reader, f"{THINKING}{FINAL}the answer é<|return|>")
    assert (said(pieces, "reasoning"), said(pieces, "content")) == ("thinking ü", "the answer é")
    assert reader.finish == "stop" and reader.reasoning_tokens == len("thinking ü".encode())
    reader = HarmonyReader(ENCODER)
    preamble = "<|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
    pieces = read(reader, f'{THINKING}{preamble}{CALL}{{"a": 1}}<|call|>')
    assert [piece.text for piece in pieces if piece.kind == "call"] == ["add"]
    assert (said(pieces, "content"), said(pieces, "arguments")) == ("Let me see.", '{"a": 1}')
    assert reader.finish == "tool_calls"


def test_two_calls_and_one_without_arguments_are_told_one_by_one() -> None:
    reader = HarmonyReader(ENCODER)
    pieces = read(reader, f'{THINKING}{CALL}{{"a": 1}}<|end|>{CALL}<|call|>')
    assert [piece.text for piece in pieces if piece.kind in ("call", "arguments")][-2:] == ["add", "{}"]
    assert [piece.kind for piece in pieces].count("call") == 2


def test_an_answer_that_is_cut_off_says_so_and_keeps_its_text() -> None:
    reader = HarmonyReader(ENCODER)
    assert said(read(reader, f"{THINKING}{FINAL}half", cut=True), "content") == "half"
    assert reader.finish == "length"
    reader = HarmonyReader(ENCODER)
    assert said(read(reader, f"{CALL}<|message|>", cut=True), "call") == "add"
    assert reader.finish == "length"


@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_content_ends_before_the_first_stop_string_and_none_of_it_is_let_out(
    text: str, stops: list[str], plain: bool
) -> None:
    reader: Reader = TextReader(ENCODER, stops) if plain else HarmonyReader(ENCODER, stops)
    pieces = read(reader, f"{text}<|return|>" if plain else f"{THINKING}{FINAL}{text}<|return|>")
    # The earliest end decides: what is written after it has never been written.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(start for end, start in ends if end == min(ends)[0])] if ends else text
    assert said(pieces, "content") == expected
    assert reader.finish == "stop"
    tokens = [token for piece in pieces for token in piece.tokens]
    assert "".join(ENCODER.decode([token.id]) for token in tokens) == expected
    assert [token.start for token in tokens] == list(range(len(expected)))


@given(st.lists(st.sampled_from([*range(97, 123), *ENCODER.encode_text("é"), *range(256, 264)]), max_size=40))
def test_pieces_are_what_the_parser_makes_of_the_whole(ids: list[int]) -> None:
    reader, pieces = HarmonyReader(ENCODER), list[Piece]()
    for token, following in pairwise([*ids, None]):
        assert token is not None
        stopped = token in ENCODER.stop_ids
        pieces += reader.feed(Event(token, None, "stop" if stopped or following is None else None))
        if reader.finish is not None:
            break
    if not ids:
        return
    parts = parse_completion(ENCODER, ids[: ids.index(token) + 1] if token in ENCODER.stop_ids else ids).parts
    # Half a character, where an answer is cut off, is let out by the parser alone.
    text = sum(len(part.text.removesuffix("\ufffd")) for part in parts if part.role is not None)
    told = sum(len(piece.text) for piece in pieces if piece.kind != "call")
    # Headers that never became a message are kept by the parser alone; calls without arguments gain `{}`.
    assert told >= text


def test_position_knows_the_channel_of_every_token() -> None:
    position = Position(ENCODER)
    channels = [position.feed(token) for token in raw_ids(ENCODER, f"{THINKING}{FINAL}é<|return|>")]
    assert channels.count("analysis") == len("thinking ü".encode()) and channels.count("final") == 2
    assert channels[-1] is None and position.channel is None


def test_json_is_enforced_in_the_final_message_alone() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    grammars = Grammars(ENCODER, vocabulary=300)
    constraint = grammars.constraint(grammars.compile(Form(schema, {})))
    for token in raw_ids(ENCODER, f"{THINKING}{FINAL}"):
        assert constraint.allowed()[token]
        constraint.accept(token)
    written: list[int] = []
    draw = random.Random(0)
    while True:
        allowed = constraint.allowed().nonzero().flatten().tolist()
        if ENCODER.return_id in allowed:
            break
        assert ENCODER.end_id not in allowed
        closing = [token for token in allowed if chr(token) == "}"]
        written.append(draw.choice(closing or allowed))
        constraint.accept(written[-1])
    assert isinstance(json.loads(ENCODER.decode(written))["a"], int)


def test_only_calls_may_end_a_turn_early_where_there_are_tools() -> None:
    grammars = Grammars(ENCODER, vocabulary=300)
    constraint = grammars.constraint(grammars.compile(Form(OBJECT, {"add": OBJECT})))
    assert taken(constraint, f'{THINKING}{CALL}{{"a": 1}}<|call|>')


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.add<|channel|>commentary <|constrain|>json<|message|>",
        " to=functions.add<|channel|>commentary<|message|>",
        "<|channel|>commentary to=functions.add <|constrain|>json<|message|>",
    ],
)
def test_a_forced_call_names_its_tool_fits_its_schema_and_is_all_there_may_be(header: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammars = Grammars(ENCODER, vocabulary=300)
    grammar = grammars.compile(Form(None, {"add": schema, "sub": OBJECT}, must_call=True))
    for before in ("", f"{THINKING}<|start|>assistant"):
        assert taken(grammars.constraint(grammar), f'{before}{header}{{"a": 1}}<|call|>')
    assert not taken(grammars.constraint(grammar), f'{header}{{"a": "x"}}<|call|>')
    assert not taken(grammars.constraint(grammar), header.replace("add", "mul"))
    assert not taken(grammars.constraint(grammar), FINAL.removeprefix("<|start|>assistant"))
    assert not taken(grammars.constraint(grammar), f"{THINKING}<|return|>")


def taken(constraint: Constraint, text: str) -> bool:
    """Whether every token of a text is allowed where it stands."""
    for token in raw_ids(ENCODER, text):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    "schema", [{"type": "strin"}, {"not": {"type": "string"}}, {"$ref": "https://x.y/z"}]
)
def test_a_schema_that_cannot_be_kept_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(FinetuneError, match="this JSON schema cannot be enforced"):
        Grammars(ENCODER, vocabulary=300).compile(Form(schema, {}))


def test_white_space_between_parts_has_an_end() -> None:
    grammars = Grammars(ENCODER, vocabulary=300)
    constraint = grammars.constraint(grammars.compile(Form(OBJECT, {})))
    for token in raw_ids(ENCODER, FINAL.removeprefix("<|start|>assistant")):
        constraint.accept(token)
    for token in raw_ids(ENCODER, "{\n" + " " * 32):
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert not constraint.allowed()[ord(" ")]


def test_the_released_vocabulary_can_be_held_to_json(shared: Path) -> None:
    encoder = HarmonyEncoder.from_dir(shared / "o200k")
    grammars = Grammars(encoder, vocabulary=201_088)
    constraint = grammars.constraint(grammars.compile(Form(OBJECT, {})))
    for token in raw_ids(encoder, '<|channel|>final<|message|>{"name": [1, 2.5, null], "é": "ü"}<|return|>'):
        allowed = constraint.allowed()
        assert allowed[token] and allowed.dtype == torch.bool
        constraint.accept(token)
