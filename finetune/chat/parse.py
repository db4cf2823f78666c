"""What the model wrote, read back into messages; whole or token by token, and never an exception.

Well-formed completions read as openai-harmony's parser reads them. Of anything else the text is kept: it
becomes content, and the completion has not ended.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetune.chat.conversation import Message, ToolCall
from finetune.chat.encode import HarmonyEncoder

Closer = Literal["end", "return", "call"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_CONSTRAIN = "<|constrain|>"
_HEADER_WORDS = re.compile(r"<\|channel\|>[^\s<]*|(?<!\S)to=[^\s<]+|<\|constrain\|>[^\s<]*")


@dataclass(frozen=True)
class Part:
    """One harmony message. Role None: text outside of any message, or in place of a header.

    `closed_by` is None where the text stops before the message's end.
    """

    text: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    role: str | None = "assistant"
    closed_by: Closer | None = None

    @property
    def is_call(self) -> bool:
        """Whether this calls a tool, complete; half a call is not one."""
        addressed = self.recipient not in (None, "all", "user") and self.channel != "final"
        return addressed and self.role == "assistant" and self.closed_by is not None


@dataclass(frozen=True)
class Delta:
    """A piece of text that has just become whole, and where it belongs; `recipient` as in the header."""

    channel: str | None
    recipient: str | None
    text: str


@dataclass(frozen=True)
class Completion:
    """A completion as messages, and its thinking, its answer and its calls at a glance.

    `content` is the final answer, or without one whatever else was said to the user. `ended` is how the model
    closed its turn; None when it did not: it ran out of tokens, or wrote what is not harmony. `parts` are the
    harmony messages one by one.
    """

    messages: tuple[Message, ...]
    thinking: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    ended: Literal["return", "call"] | None
    parts: tuple[Part, ...]


def parse_completion(encoder: HarmonyEncoder, ids: Iterable[int]) -> Completion:
    """Read what follows the `<|start|>assistant` of a prompt, up to its end or the first `<|endoftext|>`."""
    parser = StreamParser(encoder)
    for token in ids:
        parser.feed(token)
    return parser.finish()


class StreamParser:
    """Reads a completion token by token; text comes out as soon as its UTF-8 is whole."""

    def __init__(self, encoder: HarmonyEncoder) -> None:
        self._encoder = encoder
        self._closers: dict[int, Closer] = {
            encoder.end_id: "end",
            encoder.return_id: "return",
            encoder.call_id: "call",
        }
        self._parts: list[Part] = []
        self._header: list[int] | None = []  # the header being read; None outside of headers
        self._open: Part | None = None  # the message whose content is being read
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._over = False

    def feed(self, token: int) -> list[Delta]:
        """Take one token; gives the text that it completes, if any."""
        if self._over:
            return []
        if token == self._encoder.pad_id:
            self._over = True
            return self._close(None)
        closer = self._closers.get(token)
        if closer is not None:
            return self._close(closer)
        if self._open is not None and (self._open.role is not None or token != self._encoder.start_id):
            return self._say(self._utf8.decode(self._encoder.token_bytes(token)))
        if self._header is None:
            if token == self._encoder.start_id:
                deltas = self._close(None)
                self._header = []
                return deltas
            self._open = Part("", role=None)
            return self.feed(token)
        if token == self._encoder.message_id:
            self._open = _read_header(self._encoder.decode(self._header), first=not self._parts)
            self._header = None
        else:
            self._header.append(token)
        return []

    def finish(self) -> Completion:
        """The completion as read so far; nothing can be fed after it."""
        self._close(None)
        self._over = True
        return _complete(self._parts)

    def _say(self, text: str) -> list[Delta]:
        assert self._open is not None
        self._text.append(text)
        return [Delta(self._open.channel, self._open.recipient, text)] if text else []

    def _close(self, closer: Closer | None) -> list[Delta]:
        deltas: list[Delta] = []
        if self._open is not None:
            deltas = self._say(self._utf8.decode(b"", final=True))
            closer = None if self._open.role is None else closer
            self._parts.append(replace(self._open, text="".join(self._text), closed_by=closer))
        elif self._header:
            text = _HEADER_WORDS.sub("", self._encoder.decode(self._header)).strip()
            self._parts.append(Part(text if self._parts == [] else text.removeprefix("assistant"), role=None))
        self._open = self._header = None
        self._text = []
        return deltas


def _read_header(header: str, *, first: bool) -> Part:
    """The part that a header opens; `first`: the prompt has already written its role."""
    before, _, after = header.partition("<|channel|>")
    channel = re.match(r"[^\s<]*", after)
    name = channel[0] if channel else ""
    words = (before + after[len(name) :]).replace(_CONSTRAIN, f" {_CONSTRAIN}").split()
    role = "assistant"
    if not first and words:
        author = words.pop(0)
        role = author if author in _ROLES else "tool"
    recipient = content_type = None
    if words:
        last = words.pop()
        if last.startswith("to=") or (not words and not last.startswith(_CONSTRAIN)):
            recipient = last.removeprefix("to=")
        else:
            content_type = last
            recipient = words.pop().removeprefix("to=") if words else None
    return Part("", name or None, recipient, content_type, role)


def _complete(parts: Sequence[Part]) -> Completion:
    messages = _messages(parts)
    finals = [part.text for part in parts if part.channel == "final" and part.role == "assistant"]
    closed_by = parts[-1].closed_by if parts else None
    return Completion(
        messages=messages,
        thinking="\n".join(message.thinking for message in messages if message.thinking),
        content="\n".join(finals or [message.content for message in messages if message.content]),
        tool_calls=tuple(call for message in messages for call in message.tool_calls),
        ended=None if closed_by == "end" else closed_by,
        parts=tuple(parts),
    )


def _messages(parts: Sequence[Part]) -> tuple[Message, ...]:
    """Parts as the messages of a row: thinking, then a preamble and calls, or a final answer."""
    messages: list[Message] = []
    empty = growing = Message("assistant")
    for part in parts:
        if not part.is_call and (growing.content or growing.tool_calls):
            messages.append(growing)
            growing = empty
        if part.is_call:
            call = ToolCall((part.recipient or "").removeprefix("functions."), part.text)
            growing = replace(growing, tool_calls=(*growing.tool_calls, call))
        elif part.channel == "analysis" and part.role == "assistant" and part.recipient is None:
            thinking = "\n".join(filter(None, (growing.thinking, part.text)))
            growing = replace(growing, thinking=thinking or None)
        else:
            growing = replace(growing, content=part.text)
        if part.channel == "final":
            messages.append(growing)
            growing = empty
    return tuple(messages if growing == empty else [*messages, growing])
