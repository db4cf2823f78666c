"""Nano's own byte-level BPE: fixed phrases are single tokens, the letters of a word and digits stay apart.

Merges learned the usual way join frequent letter pairs, so a word to be reversed would arrive in unequal
pieces, and harmony's system message would take half of every example. Here BPE merges only punctuation. What
recurs in the training text around the slots of its questions (a slot is a number, or a word that is rare in
the text) becomes a phrase token: an added token that is not special, which is found before any merge.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

VOCABULARY = 1024
# The release gives its 21 harmony tokens the ids from 199998 on, and names the unused ones by their id.
RELEASE_FIRST_ID = 199_998
NAMED = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}
SPECIAL = tuple(NAMED.get(i, f"<|reserved_{i}|>") for i in range(RELEASE_FIRST_ID, RELEASE_FIRST_ID + 21))
FIRST_SPECIAL = VOCABULARY - len(SPECIAL)
# Texts that stand alone between two harmony tokens.
HEADERS = (
    "system",
    "developer",
    "user",
    "assistant",
    " to=assistant",
    "analysis",
    "commentary",
    "final",
    "json",
)
# A word or piece seen less often than this share of the texts' count belongs to a slot of its question.
RARE = 1 / 2000
MERGES = 16
# What nano says itself is made of words and short joints, so that it can say something else after tuning.
LONGEST_SPOKEN = 16
CUT = "\0"
WORD = re.compile(r"[A-Za-z]+")
PIECE = re.compile(rf"[^{CUT}\d\n]+\n*|\n+")


class Text(NamedTuple):
    """A text between two harmony tokens, and whether the model learns to say it."""

    content: str
    learned: bool


def special_id(name: str) -> int:
    return FIRST_SPECIAL + SPECIAL.index(name)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def fixed_pieces(texts: Sequence[Text]) -> Counter[Text]:
    """The stretches of text between slots, each line by itself, with how often they occur."""
    words = Counter(word for text in texts for word in WORD.findall(text.content))
    slot = {word for word, count in words.items() if count < RARE * len(texts) or len(word) == 1}
    pieces: Counter[Text] = Counter()
    for text in texts:
        cut = WORD.sub(lambda m: CUT if m[0] in slot else m[0], text.content)
        for piece in PIECE.findall(cut):
            pieces[Text(piece, text.learned)] += 1
    return pieces


def phrases(texts: Sequence[Text], common: Sequence[str], count: int) -> list[str]:
    """The `count` phrase tokens: headers, the pieces and words that save most tokens, everyday words."""
    savings: Counter[str] = Counter()
    for piece, occurrences in fixed_pieces(texts).items():
        if occurrences < RARE * len(texts):
            continue
        if len(piece.content) > 1 and (not piece.learned or len(piece.content) <= LONGEST_SPOKEN):
            savings[piece.content] += occurrences * (len(piece.content) - 1)
        else:
            for word in re.findall(r" [A-Za-z]{2,}", piece.content):
                savings[word] += occurrences * (len(word) - 1)
    everyday = [f" {word}" for word in common]
    chosen = [text for text, _ in savings.most_common(count - len(HEADERS) - len(set(everyday)))]
    openings = [word.capitalize() for word in common if len(word) > 1]
    found = list(dict.fromkeys([*HEADERS, *chosen, *everyday, *openings]))
    if len(found) < count:
        raise ValueError(f"{len(found)} phrases are too few: {count} tokens are to be filled")
    return found[:count]


def punctuation_merges(texts: Sequence[Text]) -> list[tuple[str, str]]:
    """The most frequent pairs of characters that are neither letters nor digits."""
    pairs: Counter[tuple[str, str]] = Counter()
    for text in texts:
        marks = "".join(c if c.isascii() and not c.isalnum() else CUT for c in text.content)
        pairs.update((a, b) for a, b in pairwise(marks) if CUT not in (a, b))
    table = byte_alphabet()
    return [(table[ord(a)], table[ord(b)]) for (a, b), _ in pairs.most_common(MERGES)]


def tokenizer_json(texts: Sequence[Text], common: Sequence[str]) -> dict[str, object]:
    """The content of tokenizer.json: bytes, merges, phrases, and harmony's tokens at the top."""
    merges = punctuation_merges(texts)
    tokens = [*byte_alphabet(), *(a + b for a, b in merges)]
    added = [(text, False) for text in phrases(texts, common, FIRST_SPECIAL - len(tokens))] + [
        (s, True) for s in SPECIAL
    ]
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(tokens) + i, "content": text, **rules, "special": special}
            for i, (text, special) in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def write_tokenizer(texts: Sequence[Text], common: Sequence[str], out: Path) -> None:
    """Choose the tokens, `common` words among them, and write the three files of a tokenizer."""
    content = tokenizer_json(texts, common)
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config = {
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, value in (
        ("tokenizer.json", content),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", roles),
    ):
        (out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
