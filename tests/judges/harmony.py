"""What openai-harmony makes of our conversations: an independent reference for token ids and masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, cast

import openai_harmony as oh  # type: ignore[import-untyped]

from finetune.chat import Conversation, Learn, Message

# harmony's own dropping of analysis stops at the first final answer: we give it what is to be shown instead
AS_GIVEN = oh.RenderConversationConfig(auto_drop_analysis=False)
EFFORTS = {effort.value.lower(): effort for effort in oh.ReasoningEffort}


def system_message(conversation: Conversation) -> oh.Message:
    content = oh.SystemContent.new().with_reasoning_effort(EFFORTS[conversation.reasoning_effort])
    if conversation.current_date:
        content = content.with_conversation_start_date(conversation.current_date)
    return oh.Message.from_role_and_content(oh.Role.SYSTEM, content)


def developer_message(conversation: Conversation, instructions: str, tools: bool) -> oh.Message | None:
    content = oh.DeveloperContent.new()
    if instructions:
        content = content.with_instructions(instructions)
    if tools and conversation.tools:
        described = [
            oh.ToolDescription.new(tool.name, tool.description, tool.parameters)
            for tool in conversation.tools
        ]
        content = content.with_function_tools(described)
    if not instructions and not (tools and conversation.tools):
        return None
    return oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)


def assistant_messages(message: Message, thinking: bool) -> list[oh.Message]:
    def say(text: str, channel: str) -> oh.Message:
        return oh.Message.from_role_and_content(oh.Role.ASSISTANT, text).with_channel(channel)

    said = [say(message.thinking, "analysis")] if thinking and message.thinking else []
    if not message.tool_calls:
        return [*said, say(message.content, "final")]
    if message.content:
        said.append(say(message.content, "commentary"))
    for call in message.tool_calls:
        addressed = say(call.arguments, "commentary").with_recipient(f"functions.{call.name}")
        said.append(addressed.with_content_type("<|constrain|>json"))
    return said


def harmony_messages(
    conversation: Conversation, stop: int, thinking_from: int
) -> tuple[list[oh.Message], list[int]]:
    """harmony's messages for the first `stop` of ours, and which of ours each comes from (-1: from none)."""
    messages, owners = [system_message(conversation)], [-1]
    first = conversation.messages[0]
    if first.role not in ("system", "developer") and conversation.tools:
        tools_only = developer_message(conversation, "", True)
        assert tools_only is not None
        messages.append(tools_only)
        owners.append(-1)
    for index, message in enumerate(conversation.messages[:stop]):
        new: list[oh.Message | None]
        if message.role == "assistant":
            new = [*assistant_messages(message, index >= thinking_from)]
        elif message.role == "user":
            new = [oh.Message.from_role_and_content(oh.Role.USER, message.content)]
        elif message.role == "tool":
            author = oh.Author.new(oh.Role.TOOL, f"functions.{message.name}")
            result = oh.Message.from_author_and_content(author, message.content)
            new = [result.with_recipient("assistant").with_channel("commentary")]
        else:
            new = [developer_message(conversation, message.content, index == 0)]
        shown = [each for each in new if each is not None]
        messages += shown
        owners += [index] * len(shown)
    return messages, owners


def _answers(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls


def turn_of(messages: Sequence[Message]) -> list[int]:
    """How many users and final answers spoke before each message: a turn's assistant messages share it."""
    counts, count = [], 0
    for message in messages:
        counts.append(count)
        count += message.role == "user" or _answers(message)
    return counts


def reference_prompt(encoding: oh.HarmonyEncoding, conversation: Conversation) -> list[int]:
    finals = [i for i, m in enumerate(conversation.messages) if _answers(m)]
    messages, _ = harmony_messages(conversation, len(conversation.messages), finals[-1] + 1 if finals else 0)
    return _rendered(encoding, _whole(messages), "completion")


def reference_examples(
    encoding: oh.HarmonyEncoding, conversation: Conversation, learn: Learn, analysis: bool
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each example: wherever the assistant acts, what harmony renders as the prompt is not
    learned, and what follows up to the next message of someone else is."""
    turns = turn_of(conversation.messages)
    spoken = sorted({t for t, m in zip(turns, conversation.messages, strict=True) if m.role == "assistant"})
    examples = []
    for turn in spoken if learn == "all_turns" else spoken[-1:]:
        ours = [i for i, m in enumerate(conversation.messages) if turns[i] == turn and m.role == "assistant"]
        finals = [i for i in range(ours[0]) if _answers(conversation.messages[i])]
        thinking_from = len(turns) if not analysis else finals[-1] + 1 if finals else 0
        example = _reference_example(
            encoding, conversation, ours, thinking_from, final_only=learn == "final_only"
        )
        if any(example[1]):
            examples.append(example)
    return examples


def _whole(messages: Sequence[oh.Message]) -> str:
    return cast(str, oh.Conversation.from_messages(messages).to_json())


# The modes share most of their renderings, and harmony's renderer is what takes the judge's time.
@lru_cache(maxsize=1000)
def _rendered(
    encoding: oh.HarmonyEncoding, conversation: str, purpose: Literal["training", "history", "completion"]
) -> list[int]:
    given = oh.Conversation.from_json(conversation)
    if purpose == "completion":
        return cast(
            list[int], encoding.render_conversation_for_completion(given, oh.Role.ASSISTANT, AS_GIVEN)
        )
    render = (
        encoding.render_conversation_for_training if purpose == "training" else encoding.render_conversation
    )
    return cast(list[int], render(given, AS_GIVEN))


@lru_cache(maxsize=10_000)
def _token_count(encoding: oh.HarmonyEncoding, message: str, tools: bool) -> int:
    options = oh.RenderOptions(conversation_has_function_tools=tools)
    return len(encoding.render(oh.Message.from_dict(json.loads(message)), options))


def _reference_example(
    encoding: oh.HarmonyEncoding,
    conversation: Conversation,
    ours: Sequence[int],
    thinking_from: int,
    *,
    final_only: bool,
) -> tuple[list[int], list[int]]:
    messages, owners = harmony_messages(conversation, ours[-1] + 1, thinking_from)
    learned_to_the_end = conversation.messages[ours[-1]].learn is not False
    ids = _rendered(encoding, _whole(messages), "training" if learned_to_the_end else "history")
    mask: list[int] = []
    for position, message in enumerate(messages):
        tokens = _token_count(encoding, message.to_json(), bool(conversation.tools))
        owner = owners[position]
        if owner not in ours:
            mask += [0] * tokens
            continue
        skipped = 0
        if owners[position - 1] not in ours or messages[position - 1].author.role != oh.Role.ASSISTANT:
            prompt = _rendered(encoding, _whole(messages[:position]), "completion")
            skipped = len(prompt) - len(mask)
            assert ids[: len(prompt)] == prompt
        learned = conversation.messages[owner].learn is not False
        learned = learned and not (final_only and message.channel != "final")
        mask += [0] * skipped + [int(learned)] * (tokens - skipped)
    assert len(mask) == len(ids)
    return ids, mask
