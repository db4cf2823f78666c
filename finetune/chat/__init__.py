"""A conversation, its harmony text and token ids, which of them are learned, and completions read back."""

from finetune.chat.conversation import Conversation, Effort, Message, ToolCall, read_conversation
from finetune.chat.encode import Encoded, HarmonyEncoder
from finetune.chat.render import Learn, Segment, render_examples, render_prompt
from finetune.chat.tools import Tool

__all__ = [
    "Conversation",
    "Effort",
    "Encoded",
    "HarmonyEncoder",
    "Learn",
    "Message",
    "Segment",
    "Tool",
    "ToolCall",
    "read_conversation",
    "render_examples",
    "render_prompt",
]
