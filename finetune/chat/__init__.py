"""A conversation, its harmony text and token ids, which of them are learned, and completions read back."""

from finetune.chat.conversation import Conversation, Effort, Message, ToolCall, read_conversation
from finetune.chat.encode import Encoded, HarmonyEncoder
from finetune.chat.parse import Completion, Delta, Part, StreamParser, parse_completion
from finetune.chat.render import Learn, Segment, render_examples, render_prompt
from finetune.chat.tools import Tool

__all__ = [
    "Completion",
    "Conversation",
    "Delta",
    "Effort",
    "Encoded",
    "HarmonyEncoder",
    "Learn",
    "Message",
    "Part",
    "Segment",
    "StreamParser",
    "Tool",
    "ToolCall",
    "parse_completion",
    "read_conversation",
    "render_examples",
    "render_prompt",
]
