"""Where in a harmony completion a token stands, while it is being written."""

from __future__ import annotations

from finetune.chat import HarmonyEncoder


class Position:
    """Follows a completion token by token, from the `<|start|>assistant` that the prompt ends with.

    `channel` is that of the message whose text is being written, None outside of a message's text;
    `addressed` says that this message goes to a tool.
    """

    def __init__(self, encoder: HarmonyEncoder) -> None:
        self._encoder = encoder
        self._header: list[int] = []
        self.channel: str | None = None
        self.addressed = False

    def feed(self, token: int) -> str | None:
        """Take one token; the channel whose text it is part of, None for headers and closing tokens."""
        encoder = self._encoder
        if token in (encoder.end_id, encoder.return_id, encoder.call_id, encoder.pad_id):
            self.channel, self._header, self.addressed = None, [], False
        elif self.channel is not None:
            return self.channel
        elif token == encoder.message_id:
            header = encoder.decode(self._header)
            words = header.partition("<|channel|>")[2].replace("<|constrain|>", " ").split()
            self.channel = words[0] if words else ""
            self.addressed = " to=" in header
            self._header = []
        elif token == encoder.start_id:
            self._header = []
        else:
            self._header.append(token)
        return None
