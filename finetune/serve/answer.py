"""From the engine's tokens to what a client is told: thinking, text and calls, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from finetune.chat import HarmonyEncoder, StreamParser
from finetune.serve.harmony import Position
from finetune.serve.sampling import Scored
from finetune.serve.scheduler import Event

Finish = Literal["stop", "length", "tool_calls"]


class ScoredToken(NamedTuple):
    """A token of the text and its log-probability; `start`: where in the text it begins, in characters."""

    id: int
    scored: Scored
    start: int


class Piece(NamedTuple):
    """`text` is new thinking or content, the name of a function that is called, or more of its arguments."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    tokens: tuple[ScoredToken, ...] = ()


class Reader(Protocol):
    """Makes pieces of events; `finish` is set by the last of them, or by a stop string before it."""

    finish: Finish | None
    reasoning_tokens: int

    def feed(self, event: Event) -> list[Piece]: ...


@dataclass
class _Content:
    """Content on its way out: cut at a stop string, of which no beginning is let out before it is decided."""

    stops: Sequence[str]
    length: int = 0  # characters let out
    held: str = ""
    stopped: bool = False

    def __post_init__(self) -> None:
        self._tokens: list[ScoredToken] = []

    def add(self, text: str, token: int, scored: Scored | None) -> None:
        if scored is not None:
            self._tokens.append(ScoredToken(token, scored, self.length + len(self.held)))
        self.held += text

    def release(self, *, last: bool = False) -> list[Piece]:
        """What can go; with `last` all that is left."""
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, self.held[: min(found)]
        keep = 0 if self.stopped or last else self._possible_stop()
        text = self.held[: len(self.held) - keep]
        self.held = self.held[len(text) :]
        self.length += len(text)
        out = [token for token in self._tokens if token.start < self.length or (last and not self.stopped)]
        self._tokens = self._tokens[len(out) :]
        return [Piece("content", text, tuple(out))] if text or out else []

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = min(len(self.held), max(map(len, self.stops), default=1) - 1)
        ends = (self.held[-size:] for size in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self.stops)), 0)


class HarmonyReader:
    """Reads an answer in harmony. Stop strings are looked for in the content, not in thinking or calls.

    With `final_only` nothing but the final message is content: the answer is to be JSON and nothing else.
    """

    def __init__(
        self, encoder: HarmonyEncoder, stops: Sequence[str] = (), *, final_only: bool = False
    ) -> None:
        self.finish: Finish | None = None
        self.reasoning_tokens = 0
        self._parser = StreamParser(encoder)
        self._position = Position(encoder)
        self._content = _Content(stops)
        self._final_only = final_only
        self._closers = (encoder.end_id, encoder.return_id, encoder.call_id)
        self._calls = 0
        self._in_call = False

    def feed(self, event: Event) -> list[Piece]:
        """What a token completes."""
        pieces: list[Piece] = []
        if event.token is not None:
            channel = self._position.feed(event.token)
            self.reasoning_tokens += channel == "analysis"
            said = channel is not None and channel != "analysis" and not self._position.addressed
            for delta in self._parser.feed(event.token):
                if delta.recipient not in (None, "all", "user") and delta.channel != "final":
                    pieces += self._call(str(delta.recipient), delta.text)
                elif delta.channel == "analysis" or (self._final_only and delta.channel != "final"):
                    pieces.append(Piece("reasoning", delta.text))
                else:
                    self._content.add(delta.text, event.token, event.scored if said else None)
                    said = False
            if said and (self._position.channel == "final" or not self._final_only):
                # A token that ends in the midst of a character.
                self._content.add("", event.token, event.scored)
            self._in_call &= event.token not in self._closers
            pieces += self._content.release()
        if self._content.stopped:
            self.finish = "stop"
        elif event.ending is not None:
            pieces += self._end(event)
        return pieces

    def _call(self, recipient: str, arguments: str) -> list[Piece]:
        begun = [] if self._in_call else [Piece("call", recipient.removeprefix("functions."))]
        self._calls += not self._in_call
        self._in_call = True
        return [*begun, Piece("arguments", arguments)]

    def _end(self, event: Event) -> list[Piece]:
        completion = self._parser.finish()
        pieces = self._content.release(last=True)
        for call in completion.tool_calls[self._calls :]:  # those without any arguments
            pieces += [Piece("call", call.name), Piece("arguments", call.arguments or "{}")]
        if event.ending == "length":
            self.finish = "length"
        else:
            self.finish = "tool_calls" if completion.tool_calls else "stop"
        return pieces


class TextReader:
    """Reads an answer as plain text, special tokens spelled out, the one that ends it left out."""

    def __init__(self, encoder: HarmonyEncoder, stops: Sequence[str] = ()) -> None:
        self.finish: Finish | None = None
        self.reasoning_tokens = 0
        self._encoder = encoder
        self._content = _Content(stops)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, event: Event) -> list[Piece]:
        """What a token completes."""
        if event.token is not None and event.token not in self._encoder.stop_ids:
            text = self._utf8.decode(self._encoder.token_bytes(event.token))
            self._content.add(text, event.token, event.scored)
        if event.ending is not None:
            self._content.held += self._utf8.decode(b"", final=True)
        pieces = self._content.release(last=event.ending is not None)
        if self._content.stopped:
            self.finish = "stop"
        elif event.ending is not None:
            self.finish = "length" if event.ending == "length" else "stop"
        return pieces
