"""What the words of the vocabulary are given after the last layer, a part of the output head at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.export.layerwise import Network

# Logits of so many tokens at once beside a part of the output head: 67 MB.
TOKENS_AT_ONCE = 1024


class Part(NamedTuple):
    """Of some tokens and the words from `first` on, every state's logits, `[tokens, words]`."""

    tokens: slice
    first: int
    logits: list[Tensor]


class Words(NamedTuple):
    """Of each token, `[n]`: the loss of its target, the logarithm of the words' sum, the likeliest word."""

    losses: Tensor
    total: Tensor
    best: Tensor


def logits_by_part(network: Network, *states: Tensor) -> Iterator[Part]:
    """Of states `[n, H]` after the last layer, of the same tokens."""
    rows, first = [network.final_norm(state) for state in states], 0
    for head in network.head():
        for start in range(0, len(rows[0]), TOKENS_AT_ONCE):
            some = slice(start, min(start + TOKENS_AT_ONCE, len(rows[0])))
            yield Part(some, first, [of_state[some] @ head.mT for of_state in rows])
        first += len(head)


def score_words(network: Network, state: Tensor, targets: Tensor) -> Words:
    """`state [n, H]` after the last layer, `targets [n]`."""
    targets = targets.to(state.device)
    total = torch.full((len(state),), -torch.inf, device=state.device)
    largest, of_target, best = total.clone(), torch.zeros_like(total), torch.zeros_like(targets)
    for some, first, (logits,) in logits_by_part(network, state):
        total[some] = torch.logaddexp(total[some], logits.logsumexp(1))
        most, word = logits.max(1)
        best[some] = torch.where(most > largest[some], word + first, best[some])
        largest[some] = torch.maximum(largest[some], most)
        target = targets[some] - first
        here = ((target >= 0) & (target < logits.shape[1])).nonzero().flatten()
        of_target[here + some.start] = logits[here, target[here]]
    return Words(total - of_target, total, best)
