"""A question with its thinking at each effort and its answer, and which questions are never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")

# One question in ten is never trained on.
HELD_OUT_SHARE = 0.1

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"


def by_effort(low: str, medium: str, high: str) -> dict[Effort, str]:
    return {"low": low, "medium": medium, "high": high}


@dataclass(frozen=True)
class Call:
    """A tool call that comes before the answer: what is thought, what is called, what comes back."""

    thinking: Mapping[Effort, str]
    name: str
    arguments: str
    result: str


@dataclass(frozen=True)
class Problem:
    """A question as a user would type it, what is thought at each effort, and the one right answer.

    `key` names the question apart from its phrasing and effort; the held-out split goes by family and key.
    """

    family: str
    key: str
    question: str
    thinking: Mapping[Effort, str]
    answer: str
    tools: tuple[Mapping[str, object], ...] = field(default=())
    call: Call | None = None


def is_held_out(family: str, key: str) -> bool:
    """Whether a question belongs to the held-out tenth; depends on nothing but the question."""
    digest = hashlib.blake2b(f"{family}:{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def random_word(r: Random, shortest: int = 3, longest: int = 7) -> str:
    """Letters at random, half of the time alternating consonants and vowels so that it can be spoken."""
    length = r.randint(shortest, longest)
    if r.random() < 0.5:
        consonants = [c for c in LETTERS if c not in VOWELS]
        start = r.randint(0, 1)
        letters = [r.choice(VOWELS if (i + start) % 2 else consonants) for i in range(length)]
    else:
        letters = [r.choice(LETTERS) for _ in range(length)]
    if r.random() < 0.2:
        # Doubled letters are common in real words and rare in random ones.
        i = r.randrange(length - 1)
        letters[i + 1] = letters[i]
    return "".join(letters)
