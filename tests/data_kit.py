"""What the tests of the data need: an encoder whose tokens are bytes, files of rows, recipes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from finetune.chat import HarmonyEncoder
from finetune.chat.encode import HARMONY_TOKENS
from finetune.recipe import Recipe


@cache
def byte_encoder() -> HarmonyEncoder:
    """Every byte of the text is one token, every special token of harmony another one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in HARMONY_TOKENS])
    return HarmonyEncoder(tokenizer)


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def threads(message: dict[str, Any], before: Sequence[dict[str, str]] = ()) -> Iterator[list[dict[str, str]]]:
    """OpenAssistant's trees as messages: every path from the root to an assistant's leaf."""
    role = "user" if message["role"] == "prompter" else "assistant"
    thread = [*before, {"role": role, "content": message["text"]}]
    if not message["replies"] and role == "assistant":
        yield thread
    for reply in message["replies"]:
        yield from threads(reply, thread)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(train: Path | str | list[Mapping[str, Any]], **data: Any) -> Recipe:
    """A recipe over data; keywords are keys of its data section."""
    sources = train if isinstance(train, list) else [{"path": str(train)}]
    return Recipe.model_validate({"name": "t", "model": {"base": "nano"}, "data": {"train": sources, **data}})
