"""Rows with known answers -> questions, and the grading of what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, assert_never

from finetune.chat import Conversation, Message, ToolCall
from finetune.errors import FinetuneError
from finetune.evaluate import graders
from finetune.evaluate.answers import final_text

if TYPE_CHECKING:
    from finetune.chat.parse import Completion
    from finetune.recipe import DataSpec, Recipe, Task

Metric = Literal["exact_match", "number", "tool_call"]


@dataclass(frozen=True)
class Question:
    """What the model is shown, and what it should answer: a text, or a call (None: no call) in tool tasks."""

    prompt: Conversation
    reference: str | ToolCall | None

    @property
    def text(self) -> str:
        """The last user message, for people to read."""
        asked = [message.content for message in self.prompt.messages if message.role == "user"]
        return asked[-1] if asked else ""


def read_questions(
    task: Task,
    recipe: Recipe | None,
    limit: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Question]:
    """The questions of a task, at most `limit`; `tell` hears of rows left out for want of an answer.

    `recipe` says how rows become conversations and which rows were held out; None takes the defaults.

    Raises:
        FinetuneError: a bad row or file, held-out rows without a recipe, or no row with an answer.
    """
    from finetune.data import held_out_conversations, read_conversations

    if task.path == "held_out":
        if recipe is None:
            raise FinetuneError(f"task {task.name!r} asks the held-out rows of a run, and this is not a run")
        conversations = held_out_conversations(recipe, task.limit)
    else:
        conversations = read_conversations(task.source(), recipe.data if recipe else _defaults(task))
    questions = [ask(conversation, task.metric) for conversation in conversations]
    answered = [question for question in questions if question is not None]
    if not answered:
        raise no_question(task, len(questions))
    if tell and len(answered) < len(questions):
        unasked = len(questions) - len(answered)
        tell(f"{task.name}: {unasked} of {len(questions)} rows end in no answer and are not asked")
    return answered[:limit]


def no_question(task: Task, rows: int) -> FinetuneError:
    """What is wrong with a task of which no row can be asked."""
    wanted = "a tool call" if task.metric == "tool_call" else "an answer"
    said = f"task {task.name!r} has no question: none of its {rows} rows ends in {wanted}"
    return FinetuneError(said, at=None if task.path == "held_out" else task.path)


def _defaults(task: Task) -> DataSpec:
    from finetune.recipe import DataSpec

    return DataSpec(train=[task.source()])


def ask(conversation: Conversation, metric: Metric) -> Question | None:
    """The question that a row asks, or None where it has no answer to compare with.

    A text is asked for where the last turn's final message begins: tool results of that turn are shown, so
    that the answer can use them. A tool call is asked for at the first learned action of the last turn.
    """
    messages = conversation.messages
    if metric == "tool_call":
        last_user = _last(messages, ("user",))
        actions = (i for i, message in enumerate(messages) if i > last_user and _is_learned(message))
        action = next(actions, None)
        if action is None:
            return None
        calls = messages[action].tool_calls
        # The model stops at <|call|>, so of several calls in one message the first is the one it can make.
        return Question(_first(conversation, action), calls[0] if calls else None)
    begin = _last(messages, ("user", "tool", "developer", "system")) + 1
    final = messages[-1]
    answered = begin < len(messages) and final.is_final and final.content.strip()
    return Question(_first(conversation, begin), final.content) if answered else None


def grade(completion: Completion, question: Question, metric: Metric) -> bool:
    """Is the answer right? Only the final message or the call counts, never the thinking."""
    reference = question.reference
    if metric == "tool_call":
        assert not isinstance(reference, str)
        return graders.tool_call(completion.tool_calls[0] if completion.tool_calls else None, reference)
    assert isinstance(reference, str)
    if metric == "exact_match":
        return graders.exact_match(final_text(completion), reference)
    if metric == "number":
        return graders.number(final_text(completion), reference)
    assert_never(metric)


def _is_learned(message: Message) -> bool:
    return message.role == "assistant" and message.learn is not False


def _last(messages: Sequence[Message], roles: tuple[str, ...]) -> int:
    """Position of the last message of these roles, -1 without one."""
    return max((i for i, message in enumerate(messages) if message.role in roles), default=-1)


def _first(conversation: Conversation, count: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[:count])
