"""The held-out loss: what the training minimises, on rows it never saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.data.packing import PackedDataset

# Logits exist for this many tokens at a time: 0.2 GB in float32 for the 201,088 words of gpt-oss.
CHUNK_TOKENS = 256


def held_out_loss(
    model: PreTrainedModel, packs: PackedDataset, on_done: Callable[[int], None] | None = None
) -> float:
    """Mean cross entropy (nats) over every learned token of packed examples; without gradients.

    Only learned positions go through the output head, so no [L, vocabulary] logits are ever held.
    """
    from finetune.data.packing import collate

    # Inside a PeftModel is the model with `.model` (the layers) and `.lm_head`; its LoRA stays in effect.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(packs)):
            batch = {name: tensor.to(model.device) for name, tensor in collate([packs[i]]).items()}
            labels = batch.pop("labels")[:, 1:]
            hidden = inner.model(**batch, use_cache=False).last_hidden_state[:, :-1]
            learned = labels != -100
            states, targets = hidden[learned], labels[learned]
            for start in range(0, len(targets), CHUNK_TOKENS):
                logits = inner.lm_head(states[start : start + CHUNK_TOKENS]).float()
                chunk = targets[start : start + CHUNK_TOKENS]
                total += F.cross_entropy(logits, chunk, reduction="sum").item()
            count += len(targets)
            if on_done:
                on_done(1)
    return total / count
