"""Token ids of harmony segments, with any tokenizer that has harmony's special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat.conversation import Conversation
from finetune.chat.render import Learn, Segment, render_examples, render_prompt
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HARMONY_TOKENS = (
    "<|start|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|channel|>",
    "<|constrain|>",
    "<|endoftext|>",
)

_SHOWN, _LEARNED = [0], [1]
# Headers and the system message recur in every row, and are all shorter than this.
_CACHED_CHARACTERS = 400
_CACHED_TEXTS = 4096


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and for each of them 1 where the model learns it, else 0."""

    ids: list[int]
    learn: list[int]


class HarmonyEncoder:
    """Turns segments into token ids and back.

    It owns the tokenizer it is given: padding, truncation and the reading of special tokens in plain text are
    switched off there. Plain text never becomes a special token, whatever it spells.

    Attributes: start_id, message_id, end_id, return_id, call_id, channel_id, constrain_id, pad_id
    (endoftext); stop_ids, where generation stops: return, call, endoftext.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._special: dict[str, int] = {}
        self._texts: dict[str, list[int]] = {}
        self._bytes: dict[int, bytes] = {}
        for text in HARMONY_TOKENS:
            number = tokenizer.token_to_id(text)
            if number is None:
                raise FinetuneError(f"the tokenizer has no {text} token, which the harmony format needs")
            self._special[text] = number
        self.start_id = self._special["<|start|>"]
        self.message_id = self._special["<|message|>"]
        self.end_id = self._special["<|end|>"]
        self.return_id = self._special["<|return|>"]
        self.call_id = self._special["<|call|>"]
        self.channel_id = self._special["<|channel|>"]
        self.constrain_id = self._special["<|constrain|>"]
        self.pad_id = self._special["<|endoftext|>"]
        self.stop_ids = (self.return_id, self.call_id, self.pad_id)
        if not set(self._special.values()).isdisjoint(self.encode_text(" ".join(HARMONY_TOKENS))):
            raise FinetuneError("the tokenizer has harmony's tokens, but does not mark them as special")

    @classmethod
    def from_dir(cls, path: str | Path) -> HarmonyEncoder:
        """Read a checkpoint's `tokenizer.json`; FinetuneError if it is missing or not harmony's."""
        from tokenizers import Tokenizer

        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise FinetuneError("there is no tokenizer.json here", at=str(path))
        try:
            return cls(Tokenizer.from_file(str(file)))
        except FinetuneError as error:
            raise FinetuneError(error.sentence, at=str(file)) from None
        except Exception as error:  # tokenizers raises a bare Exception for a file it cannot read
            raise FinetuneError(f"this tokenizer cannot be read: {error}", at=str(file)) from None

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; what spells a special token stays text."""
        return self._lookup([text])[text]

    def encode(self, segments: Sequence[Segment]) -> Encoded:
        """Each segment is tokenised by itself, as openai-harmony does."""
        return self.encode_many([segments])[0]

    def encode_many(self, examples: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """`encode` for a batch: each distinct text is tokenised once, in one call that releases the GIL."""
        texts = {segment.text for example in examples for segment in example if not segment.special}
        ids_of = self._lookup(list(texts))
        encoded = []
        for example in examples:
            ids: list[int] = []
            learn: list[int] = []
            for text, special, learned in example:
                if special:
                    ids.append(self._special[text])
                    learn.append(int(learned))
                else:
                    piece = ids_of[text]
                    ids += piece
                    learn += (_LEARNED if learned else _SHOWN) * len(piece)
            encoded.append(Encoded(ids, learn))
        return encoded

    def _lookup(self, texts: list[str]) -> dict[str, list[int]]:
        known = self._texts
        ids_of: dict[str, list[int]] = {}
        missing = []
        for text in texts:
            # One look, not two: another thread may clear what is known in between.
            if (found := known.get(text)) is None:
                missing.append(text)
            else:
                ids_of[text] = found
        if missing:
            if len(known) > _CACHED_TEXTS:
                known.clear()
            batch = self._plain().encode_batch_fast(missing, add_special_tokens=False)
            for text, encoding in zip(missing, batch, strict=True):
                ids_of[text] = encoding.ids
                if len(text) <= _CACHED_CHARACTERS:
                    known[text] = ids_of[text]
        return ids_of

    def _plain(self) -> Tokenizer:
        """The tokenizer as we need it; transformers switches these on and off on one that it shares.

        They are only set where they are not right: to set one waits until no other thread encodes.
        """
        tokenizer = self.tokenizer
        if not tokenizer.encode_special_tokens:
            tokenizer.encode_special_tokens = True
        if tokenizer.padding is not None:
            tokenizer.no_padding()
        if tokenizer.truncation is not None:
            tokenizer.no_truncation()
        return tokenizer

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids the model goes on from to answer the conversation."""
        return self.encode(render_prompt(conversation)).ids

    def examples(
        self, conversation: Conversation, *, learn: Learn = "last_turn", analysis: bool = True
    ) -> list[Encoded]:
        """`render_examples`, encoded."""
        return self.encode_many(render_examples(conversation, learn=learn, analysis=analysis))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; none for an id outside the vocabulary."""
        found = self._bytes.get(token)
        if found is None:
            text = self.tokenizer.id_to_token(token) if token >= 0 else None
            found = self._bytes[token] = b"" if text is None else _token_bytes(text)
        return found


def _token_bytes(text: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in text)
    except KeyError:
        return text.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 is itself, the rest is moved past 255."""
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    table = {chr(byte): byte for first, last in spans for byte in range(ord(first), ord(last) + 1)}
    moved = [byte for byte in range(256) if chr(byte) not in table]
    return table | {chr(256 + place): byte for place, byte in enumerate(moved)}
