"""Probes of a run by our own model: for an export whose record was written without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat import Conversation, HarmonyEncoder, Message
from finetune.errors import FinetuneError
from finetune.probe import Probe, find_probes
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterator

# Each is answered twice by a model that may be large and on a processor.
QUESTIONS = 8
# Asked where a run kept no rows to be measured on.
PLAIN = ("Who are you?", "What is 17 + 25?", "Name three colours.", "Why is the sky blue?")


def ask_run(run: Path) -> list[Probe]:
    """Find probes among a run's held-out questions; loads base and adapter, and lets go of them."""
    import torch

    from finetune.model import load_model, resolve

    encoder = HarmonyEncoder.from_dir(resolve(run).base)
    prompts = [encoder.prompt_ids(conversation) for conversation in _questions(RunDir.open(run))]
    model, _ = load_model(run)
    probes = find_probes(model, encoder, prompts)
    del model
    if torch.cuda.is_available():
        # The engine that is started next wants the memory.
        torch.cuda.empty_cache()
    return probes


def _questions(run: RunDir) -> Iterator[Conversation]:
    from finetune.data import held_out_conversations

    try:
        found = held_out_conversations(run.recipe(), QUESTIONS)
    except FinetuneError:
        # The data may have moved since; any question does.
        found = []
    for conversation in found:
        last = max((i for i, one in enumerate(conversation.messages) if one.role == "user"), default=None)
        if last is not None:
            yield replace(conversation, messages=conversation.messages[: last + 1])
    if not found:
        yield from (Conversation((Message("user", text),)) for text in PLAIN)
