"""Training batches: conversations made on the fly and batched with others of their length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random

import torch
from torch import Tensor

from finetune.chat.conversation import read_conversation
from finetune.chat.encode import Encoded, HarmonyEncoder
from finetune.chat.render import render_examples
from finetune.nano.skills import training_row

IGNORED = -100
# Conversations that are sorted by length together: enough that little of a batch is padding.
POOL = 8192


def batch(examples: list[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """`ids` and unshifted `labels`, both `[examples, longest]`, padded on the right."""
    shape = (len(examples), max(len(e.ids) for e in examples))
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    for i, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = torch.where(torch.tensor(example.learn) > 0, tokens, IGNORED)
    return ids, labels


def batches(
    encoder: HarmonyEncoder, weights: Mapping[str, float], tokens: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of at most `tokens` tokens, padding included; the same seed gives the same batches."""
    r = Random(seed)
    while True:
        rows = [read_conversation(training_row(r, weights)) for _ in range(POOL)]
        examples = encoder.encode_many([example for row in rows for example in render_examples(row)])
        examples.sort(key=lambda e: len(e.ids))
        groups: list[list[Encoded]] = [[]]
        for example in examples:
            # Sorted: the newest example is the longest of its batch.
            if (len(groups[-1]) + 1) * len(example.ids) > tokens:
                groups.append([])
            groups[-1].append(example)
        # The last group may be small; a small batch would weigh its few examples as much as a full one.
        groups = groups[:-1] if len(groups) > 1 else groups
        r.shuffle(groups)
        for group in groups:
            yield batch(group, encoder.pad_id)
