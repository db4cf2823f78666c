"""A completion as JSON, and a graded one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.chat.parse import Completion


def completion_to_dict(completion: Completion, tokens: int) -> dict[str, Any]:
    """Keys: thinking, content, tool_calls, ended, tokens (how many).

    `ended` is "return", "call", or null where the answer was cut off.
    """
    calls = [{"name": call.name, "arguments": call.arguments} for call in completion.tool_calls]
    return {
        "thinking": completion.thinking,
        "content": completion.content,
        "tool_calls": calls,
        "ended": completion.ended,
        "tokens": tokens,
    }


def final_text(completion: Completion) -> str:
    """What the model said on the final channel; `completion.content` falls back to other text without one."""
    finals = [part.text for part in completion.parts if part.channel == "final" and part.role == "assistant"]
    return "\n".join(finals)


@dataclass(frozen=True)
class Answer:
    """What a model made of one question."""

    completion: Completion
    tokens: int
    right: bool

    @property
    def empty(self) -> bool:
        """Neither a final message nor a tool call."""
        return not final_text(self.completion).strip() and not self.completion.tool_calls

    @property
    def truncated(self) -> bool:
        """No closing token: the limit on new tokens cut it off."""
        return self.completion.ended is None

    def to_dict(self) -> dict[str, Any]:
        return {"right": self.right, **completion_to_dict(self.completion, self.tokens)}
