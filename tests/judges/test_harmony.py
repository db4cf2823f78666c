"""openai-harmony judges our rendering, masks and parsing, token for token on the released tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings

from finetune.chat import Conversation, HarmonyEncoder, Learn, Tool, parse_completion, read_conversation
from finetune.chat.tools import tools_section
from finetune.errors import FinetuneError
from tests.conversations import few_parameters, rows, schemas, some_text, texts

oh = pytest.importorskip("openai_harmony", reason="the judge of harmony is not installed")
judge = pytest.importorskip("tests.judges.harmony")

many = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


@pytest.fixture(scope="module")
def encoder(shared: Path) -> HarmonyEncoder:
    return HarmonyEncoder.from_dir(shared / "o200k")


@pytest.fixture(scope="module")
def encoding(shared: Path) -> Any:
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(shared / "o200k")
    return oh.load_harmony_encoding("HarmonyGptOss")


def agree(encoder: HarmonyEncoder, encoding: Any, conversation: Conversation) -> int:
    """Compare the prompt and every mode's examples; gives the number of renderings compared."""
    assert encoder.prompt_ids(conversation) == judge.reference_prompt(encoding, conversation)
    compared = 1
    for learn, analysis in [*((learn, True) for learn in get_args(Learn)), ("last_turn", False)]:
        expected = judge.reference_examples(encoding, conversation, learn, analysis)
        try:
            examples = encoder.examples(conversation, learn=learn, analysis=analysis)
        except FinetuneError:
            assert expected == []
            continue
        assert [(example.ids, example.learn) for example in examples] == expected
        compared += len(examples)
    return compared


def test_generated_conversations_render_and_learn_as_harmony_has_it(
    encoder: HarmonyEncoder, encoding: Any
) -> None:
    seen = 0

    @given(row=rows())
    @settings(many, max_examples=2000)
    def check(row: dict[str, object]) -> None:
        nonlocal seen
        agree(encoder, encoding, read_conversation(row))
        seen += 1

    check()
    assert seen >= 2000


def test_generated_tools_are_shown_as_harmony_shows_them(encoding: Any) -> None:
    @given(description=texts, schema=schemas | few_parameters)
    @settings(many, max_examples=1000)
    def check(description: str, schema: dict[str, object] | None) -> None:
        tool = Tool("f", description, schema)
        message = judge.developer_message(Conversation((), (tool,)), "", True)
        shown = encoding.decode(encoding.render(message)).removeprefix("<|start|>developer<|message|>")
        assert tools_section([tool]) == shown.removesuffix("<|end|>")

    check()


def test_plain_text_becomes_the_same_tokens(encoder: HarmonyEncoder, encoding: Any) -> None:
    @given(text=some_text)
    @settings(many, max_examples=500)
    def check(text: str) -> None:
        ids = encoder.encode_text(text)
        assert ids == encoding.encode(text, disallowed_special=())
        assert encoder.decode(ids) == text

    check()


def test_history_is_shown_as_harmony_itself_would_after_one_final_answer(
    encoder: HarmonyEncoder, encoding: Any
) -> None:
    """Where harmony's own dropping of analysis has one final answer to look at, it agrees with ours."""
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "thinking": "a", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "thinking": "b", "content": "3"},
        {"role": "user", "content": "4"},
    ]
    for stop in (1, 3, 5):
        conversation = read_conversation({"messages": messages[:stop]})
        shown, _ = judge.harmony_messages(conversation, stop, 0)
        whole = oh.Conversation.from_messages(shown)
        expected = encoding.render_conversation_for_completion(whole, oh.Role.ASSISTANT)
        assert encoder.prompt_ids(conversation) == expected


def test_completions_are_read_as_harmony_reads_them(encoder: HarmonyEncoder, encoding: Any) -> None:
    @given(row=rows())
    @settings(many, max_examples=300)
    def check(row: dict[str, object]) -> None:
        try:
            examples = encoder.examples(read_conversation(row), learn="all_turns")
        except FinetuneError:
            return
        for example in examples:
            for ids in completions(example.ids, example.learn, encoder.start_id):
                theirs = encoding.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
                assert [as_part(message) for message in theirs] == [
                    (part.role, part.channel, part.recipient, part.content_type, part.text)
                    for part in parse_completion(encoder, ids).parts
                ]

    check()


def completions(ids: list[int], learn: list[int], start: int) -> Iterator[list[int]]:
    """The runs of learned tokens, without the header that opens one after a message not to be learned."""
    run: list[int] = []
    for token, learned in [*zip(ids, learn, strict=True), (0, 0)]:
        if learned:
            run.append(token)
        elif run:
            yield run[2:] if run[0] == start else run
            run = []


def as_part(message: Any) -> tuple[object, ...]:
    text = "".join(content.text for content in message.content)
    return (message.author.role.value, message.channel, message.recipient, message.content_type, text)


def glaive(shared: Path) -> Iterator[Mapping[str, object]]:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
    for row in json.loads((shared / "data/llamafactory_demo/glaive_toolcall_en_demo.json").read_text()):
        messages: list[dict[str, object]] = []
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                messages.append({"role": "assistant", "tool_calls": [json.loads(turn["value"])]})
            else:
                messages.append({"role": roles[turn["from"]], "content": turn["value"]})
        yield {"messages": messages, "tools": row["tools"]}


def reason_tool_use(shared: Path) -> Iterator[Mapping[str, object]]:
    for line in (shared / "data/llamafactory_demo/reason_tool_use_demo_50.jsonl").read_text().splitlines():
        yield json.loads(line)


def identity(shared: Path) -> Iterator[Mapping[str, object]]:
    for row in json.loads((shared / "data/llamafactory_demo/identity.json").read_text()):
        question = "\n".join(filter(None, (row["instruction"], row["input"])))
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": row["output"]},
            ]
        }


def oasst(shared: Path) -> Iterator[Mapping[str, object]]:
    """Every path from a root to a leaf that has an answer in it."""
    roles = {"prompter": "user", "assistant": "assistant"}

    def paths(node: dict[str, Any], before: list[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
        path = [*before, {"role": roles[node["role"]], "content": node["text"]}]
        for reply in node.get("replies") or []:
            yield from paths(reply, path)
        if not node.get("replies") and any(message["role"] == "assistant" for message in path):
            yield path

    seen: set[str] = set()
    for name in ("en_100_tree.jsonl", "en_100_message.jsonl"):
        for line in (shared / "data/oasst" / name).read_text().split("\n"):
            if line:
                row = json.loads(line)
                for path in paths(row.get("prompt", row), []):
                    if str(path) not in seen:
                        seen.add(str(path))
                        yield {"messages": path}


@pytest.mark.parametrize(
    ("source", "least"), [(glaive, 300), (reason_tool_use, 50), (identity, 91), (oasst, 100)]
)
def test_public_data_renders_and_learns_as_harmony_has_it(
    source: Any, least: int, shared: Path, encoder: HarmonyEncoder, encoding: Any
) -> None:
    compared = [agree(encoder, encoding, read_conversation(row)) for row in source(shared)]
    print(f"{source.__name__}: {len(compared)} conversations, {sum(compared)} renderings")
    assert len(compared) >= least
