"""One step of the model: tokens of several sequences in, the next token's logits of each out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.serve.adapters import Adapters
from finetune.serve.attention import NAME, Span, lay_out
from finetune.serve.cache import KeyValueCache
from finetune.serve.sizes import padded


class Work(NamedTuple):
    """Token ids of one sequence to compute, and where its keys and values are."""

    ids: Sequence[int]
    span: Span


class Runner:
    """The model, its adapters and its cache; attention becomes the one that reads from the cache."""

    def __init__(self, model: GptOssForCausalLM, adapters: Adapters, cache: KeyValueCache) -> None:
        self.model = model
        self.adapters = adapters
        self.cache = cache
        model.config._attn_implementation = NAME

    @torch.inference_mode()
    def step(self, adapter: str | None, work: Sequence[Work]) -> Tensor:
        """Compute `work` with one adapter; single tokens come before longer chunks.

        Returns the logits after the last token of each, float32 `[len(work), V]`.
        """
        self.adapters.switch(adapter)
        device = self.cache.keys[0].device
        ids = [token for item in work for token in item.ids]
        positions = [p for item in work for p in range(item.span.start, item.span.start + item.span.length)]
        ends = list(accumulate(item.span.length for item in work))
        # What pads a step is its last token once more: it asks for no further experts.
        for values in (ids, positions, ends):
            values += values[-1:] * (padded(len(values), self.cache.keys[0]) - len(values))
        steps = lay_out(
            self.cache,
            [item.span for item in work],
            query_heads=self.model.config.num_attention_heads,
        )
        out = self.model.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            attention_mask=steps,
            use_cache=False,
        )
        last = out.last_hidden_state[0, torch.tensor(ends, device=device) - 1]
        logits: Tensor = self.model.lm_head(last)
        return logits[: len(work)].float()
