"""What an export is asked about: held-out conversations up to the answer, or random tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune.chat import Conversation, HarmonyEncoder
from finetune.data import held_out_conversations, read_conversations
from finetune.errors import FinetuneError
from finetune.export.subject import Subject
from finetune.recipe import DataSpec, Source

COUNT = 8
LONGEST = 512  # tokens, from the front
RANDOM_TOKENS = 48


@dataclass(frozen=True)
class Prompts:
    """Token ids, and in words what they are."""

    ids: list[list[int]]
    what: str


def find_prompts(subject: Subject, data: Path | None) -> Prompts:
    """Up to COUNT prompts: of the file `data`, of the run's held-out rows, or random tokens.

    Raises:
        FinetuneError: the file or the run's data cannot be read, or the file holds no question.
    """
    if data is not None:
        source = Source(path=str(data), limit=COUNT)
        found, what = read_conversations(source, DataSpec(train=[source])), f"rows of {data.name}"
    elif subject.run:
        found, what = held_out_conversations(subject.run.recipe(), COUNT), "held-out conversations"
    else:
        found, what = [], ""
    asked = [prompt for conversation in found if (prompt := _prompt(conversation))]
    if data is not None and not asked:
        raise FinetuneError("this file asks nothing", at=str(data))
    if not asked:
        return _random(subject)
    encoder = HarmonyEncoder.from_dir(subject.base.path)
    ids = [encoder.prompt_ids(prompt)[:LONGEST] for prompt in asked]
    return Prompts(ids, f"{len(ids)} {what}")


def _prompt(conversation: Conversation) -> Conversation | None:
    """The conversation without its last answer; None when nothing is left."""
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return replace(conversation, messages=tuple(messages)) if messages else None


def _random(subject: Subject) -> Prompts:
    from finetune.model import inspect_checkpoint

    vocabulary = inspect_checkpoint(subject.base.path).config["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (COUNT, RANDOM_TOKENS), generator=generator)
    return Prompts(ids.tolist(), f"{COUNT} rows of random tokens")
