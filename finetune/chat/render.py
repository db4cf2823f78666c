"""Harmony: the text of a conversation in segments, and which of them the model learns.

The rules are those of openai-harmony (github.com/openai/harmony, docs/format.md); where its renderer and its
documents leave a choice, we show what the model sees, and learn what it writes, at inference:

- A turn runs from the `<|start|>assistant` that the prompt ends with to the final answer, tool rounds
  included; another user message also ends it. That header, and the one after each tool result, belong to the
  prompt. All else that the assistant says in the turn is learned, headers between its own messages included:
  also the one before the second of several calls, which only an engine that reads on past `<|call|>` can
  have let the model make.
- Thinking before the last final answer of the history is dropped, as at inference; thinking of an unfinished
  turn is still shown. (openai-harmony's auto_drop_analysis only looks at the *first* final answer.)
- `<|return|>` closes a learned final answer; shown as history, or not learned, it is closed by `<|end|>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from finetune.chat.conversation import Conversation, Message
from finetune.chat.tools import tools_section
from finetune.errors import FinetuneError

Learn = Literal["last_turn", "all_turns", "final_only"]

START, MESSAGE, END = "<|start|>", "<|message|>", "<|end|>"
RETURN, CALL, CHANNEL, CONSTRAIN = "<|return|>", "<|call|>", "<|channel|>", "<|constrain|>"

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
FUNCTIONS = "Calls to these tools must go to the commentary channel: 'functions'."


class Segment(NamedTuple):
    """A piece of harmony text, tokenised by itself: one special token, or text without any."""

    text: str
    special: bool
    learned: bool


_SPECIAL = {
    (text, learned): Segment(text, True, learned)
    for text in (START, MESSAGE, END, RETURN, CALL, CHANNEL, CONSTRAIN)
    for learned in (False, True)
}
_COMMENTARY = Segment("commentary", False, False)


@dataclass(frozen=True, slots=True)
class _View:
    """How one example shows its conversation: the messages of `turn` are learned, thinking is shown from
    message `thinking_from` on."""

    conversation: Conversation
    turn: range
    thinking_from: int
    final_only: bool = False


def render_prompt(conversation: Conversation) -> list[Segment]:
    """The whole conversation as history, then `<|start|>assistant`: what the model is asked to go on from."""
    count = len(conversation.messages)
    view = _View(conversation, range(count, count), _after_last_final(conversation.messages))
    return [*_render(view), _SPECIAL[START, False], Segment("assistant", False, False)]


def render_examples(
    conversation: Conversation, *, learn: Learn = "last_turn", analysis: bool = True
) -> list[list[Segment]]:
    """The training examples of a conversation, each as segments from the system message to the closing token.

    `last_turn` gives one example, `all_turns` one for each assistant turn that has something to learn, each
    shown as the model sees it then; `final_only` shows the last turn and learns only its final answer. With
    `analysis` False the thinking is left out altogether. What comes after the last assistant message is not
    shown. Raises FinetuneError when there is nothing to learn.
    """
    messages = conversation.messages
    turns = list(_turns(messages))
    if not turns:
        raise FinetuneError("the conversation has no assistant message to learn")
    examples = []
    for turn in turns if learn == "all_turns" else turns[-1:]:
        thinking_from = _after_last_final(messages[: turn.start]) if analysis else len(messages)
        example = _render(_View(conversation, turn, thinking_from, learn == "final_only"))
        if any(segment.learned for segment in example):
            examples.append(example)
    if not examples:
        has_final = any(messages[index].is_final for index in turns[-1])
        if learn == "final_only" and not has_final:
            raise FinetuneError("the last assistant turn has no final answer, which alone is to be learned")
        raise FinetuneError('there is nothing to learn: the assistant messages are marked "learn": false')
    return examples


def _turns(messages: Sequence[Message]) -> Iterator[range]:
    """The messages of each assistant turn, from its first assistant message to its last."""
    start = stop = 0
    for index, message in enumerate(messages):
        if message.role == "assistant":
            start = index if stop <= start else start
            stop = index + 1
        if stop > start and (message.role == "user" or message.is_final):
            yield range(start, stop)
            start = stop
    if stop > start:
        yield range(start, stop)


def _after_last_final(messages: Sequence[Message]) -> int:
    return max((index + 1 for index, message in enumerate(messages) if message.is_final), default=0)


def _render(view: _View) -> list[Segment]:
    conversation = view.conversation
    messages, tools = conversation.messages, conversation.tools
    out = _shown("system", _system_text(conversation))
    instructed = bool(messages) and messages[0].role in ("system", "developer")
    if tools and not instructed:
        out += _shown("developer", tools_section(tools))
    shown = messages[: view.turn.stop]
    for index, message in enumerate(shown):
        if message.role == "assistant":
            _render_assistant(out, view, index)
        elif message.role == "tool":
            header = [Segment(" to=assistant", False, False), _SPECIAL[CHANNEL, False], _COMMENTARY]
            out += _shown(f"functions.{message.name}", message.content, *header)
        elif message.role == "user":
            header = [Segment(f":{message.name}", False, False)] if message.name else []
            out += _shown("user", message.content, *header)
        else:
            sections = ["# Instructions", message.content] if message.content else []
            if tools and index == 0:
                sections.append(tools_section(tools))
            if sections:  # empty instructions are none
                out += _shown("developer", "\n\n".join(sections))
    return out


def _system_text(conversation: Conversation) -> str:
    lines = [IDENTITY, f"Knowledge cutoff: {conversation.knowledge_cutoff}"]
    if conversation.current_date:
        lines.append(f"Current date: {conversation.current_date}")
    lines += ["", f"Reasoning: {conversation.reasoning_effort}", "", CHANNELS]
    if conversation.tools:
        lines.append(FUNCTIONS)
    return "\n".join(lines)


def _shown(author: str, text: str, *header: Segment) -> list[Segment]:
    return [
        _SPECIAL[START, False],
        Segment(author, False, False),
        *header,
        _SPECIAL[MESSAGE, False],
        Segment(text, False, False),
        _SPECIAL[END, False],
    ]


def _render_assistant(out: list[Segment], view: _View, index: int) -> None:
    message = view.conversation.messages[index]
    learned = index in view.turn and message.learn is not False
    learn_rest = learned and not view.final_only
    # the model itself writes the header where its own words come right before, in the same turn
    goes_on = index - 1 in view.turn and view.conversation.messages[index - 1].role == "assistant"
    if message.thinking and index >= view.thinking_from:
        _say(out, "analysis", message.thinking, END, learn_rest, goes_on)
        goes_on = True
    if message.is_final:
        _say(out, "final", message.content, RETURN if learned else END, learned, goes_on)
        return
    if message.content:
        _say(out, "commentary", message.content, END, learn_rest, goes_on)
        goes_on = True
    for call in message.tool_calls:
        _say(out, "commentary", call.arguments, CALL, learn_rest, goes_on, f" to=functions.{call.name}")
        goes_on = True


def _say(
    out: list[Segment], channel: str, text: str, close: str, learned: bool, goes_on: bool, recipient: str = ""
) -> None:
    out.append(_SPECIAL[START, learned and goes_on])
    out.append(Segment("assistant", False, learned and goes_on))
    if recipient:
        out.append(Segment(recipient, False, learned))
    out.append(_SPECIAL[CHANNEL, learned])
    out.append(Segment(channel, False, learned))
    if recipient:
        out.append(Segment(" ", False, learned))
        out.append(_SPECIAL[CONSTRAIN, learned])
        out.append(Segment("json", False, learned))
    out.append(_SPECIAL[MESSAGE, learned])
    out.append(Segment(text, False, learned))
    out.append(_SPECIAL[close, learned])
