"""A tokenizer of bytes with harmony's special tokens, and segments as text that shows what is learned."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from finetune.chat import HarmonyEncoder, Segment
from finetune.chat.encode import HARMONY_TOKENS


def byte_tokenizer(*, specials: Iterable[str] = HARMONY_TOKENS, special: bool = True) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in specials])
    return tokenizer


def byte_encoder() -> HarmonyEncoder:
    return HarmonyEncoder(byte_tokenizer())


def marked(segments: Iterable[Segment]) -> str:
    """The text from the first message after harmony's system message on, what is learned between « and »."""
    out = ""
    for segment in segments:
        out += f"«{segment.text}»" if segment.learned else segment.text
    return out.replace("»«", "").split("<|end|>", 1)[1]
