"""nano's tokenizer: any text comes back, harmony's tokens are the release's, letters stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.chat.encode import HarmonyEncoder
from finetune.chat.render import CHANNELS, IDENTITY
from finetune.model import resolve
from finetune.nano.problem import LETTERS, random_word
from finetune.nano.tokenizer import SPECIAL, VOCABULARY

NANO = resolve("nano").base
ENCODER = HarmonyEncoder.from_dir(NANO)


@given(st.text(max_size=200))
def test_any_text_comes_back(text: str) -> None:
    assert ENCODER.decode(ENCODER.encode_text(text)) == text


def test_public_mathematics_comes_back(shared: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:200]:
        row = json.loads(line)
        text = row["question"] + row["answer"]
        assert ENCODER.decode(ENCODER.encode_text(text)) == text


def test_the_harmony_tokens_are_the_releases_at_the_top(shared: Path) -> None:
    released = json.loads((shared / "o200k" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [token["content"] for token in sorted(released, key=lambda t: t["id"])] == list(SPECIAL)
    ids = [ENCODER.tokenizer.token_to_id(name) for name in SPECIAL]
    assert ids == list(range(VOCABULARY - len(SPECIAL), VOCABULARY))
    assert ENCODER.tokenizer.get_vocab_size() == VOCABULARY


def test_every_digit_is_a_token() -> None:
    assert len(ENCODER.encode_text("907 + 1234567890")) == 3 + 1 + 10


@pytest.mark.parametrize(
    "phrasing",
    [
        "Reverse the word {}.",
        "Write {} in capitals.",
        "Sort the letters of {}.",
        "How often does {} contain e?",
    ],
)
def test_the_letters_of_a_word_are_single_tokens(phrasing: str) -> None:
    r = Random(0)
    letters = {ENCODER.encode_text(letter)[0] for letter in LETTERS}
    for _ in range(100):
        word = random_word(r)
        ids = ENCODER.encode_text(phrasing.format(word))
        spelled = [i for i in ids if i in letters]
        assert ENCODER.decode(spelled) == word + ("e" if phrasing.endswith("e?") else "")


def test_what_recurs_in_every_conversation_is_a_few_tokens() -> None:
    assert (
        len(ENCODER.encode_text(f"{IDENTITY}\nKnowledge cutoff: 2024-06\n\nReasoning: low\n\n{CHANNELS}"))
        < 20
    )
    for header in ("system", "developer", "user", "assistant", "analysis", "commentary", "final"):
        assert len(ENCODER.encode_text(header)) == 1
