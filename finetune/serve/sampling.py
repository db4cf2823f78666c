"""How the next token is chosen: greedily, or drawn with a request's own random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_logprobs` None reports no log-probabilities, 0 that of the token alone.

    `logit_bias` is added to the logits of its tokens. Of a token that the answer holds n times already the
    penalties take n * frequency_penalty + presence_penalty, as OpenAI's API defines them. `stop_ids` end the
    answer and are part of it. `max_tokens` 0 is as many as there is room for.
    """

    max_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


class Scored(NamedTuple):
    """Natural log-probabilities of the chosen token and of the likeliest, before temperature, penalties and
    masks."""

    logprob: float
    top: list[tuple[int, float]]


class Draws:
    """How one sequence draws, and the random numbers of its own that it draws with.

    Each token takes one number, so a seed gives the same answer whatever else runs. (Up to rounding: the size
    of a batch changes the order of sums, in float32 by about 1e-6, and a draw that lands so close to the
    border of two tokens may go to the other.)
    """

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self.added = dict(sampling.logit_bias)  # to the logits of these tokens
        self._penalties = sampling.frequency_penalty, sampling.presence_penalty
        self._written: set[int] = set()
        self._random = random.Random(sampling.seed)

    def next(self) -> float:
        """In [0, 1)."""
        return self._random.random()

    def wrote(self, token: int) -> None:
        """The token that was chosen, and is from now on less likely."""
        if any(self._penalties):
            each, first = self._penalties
            penalty = each if token in self._written else each + first
            self.added[token] = self.added.get(token, 0.0) - penalty
            self._written.add(token)


def choose(logits: Tensor, draws: Sequence[Draws], masks: Sequence[Tensor | None]) -> list[int]:
    """The next token of each row of `logits [n, V]`; a mask `[V]` bool says what a row may choose at all."""
    if any(mask is not None for mask in masks) or any(draw.added for draw in draws):
        logits = logits.clone()
        for row, draw, mask in zip(logits, draws, masks, strict=True):
            if draw.added:
                row[list(draw.added)] += torch.tensor(list(draw.added.values()), device=row.device)
            if mask is not None:
                row.masked_fill_(~mask.to(row.device), -torch.inf)
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if drawn:
        for row, token in zip(drawn, _draw(logits[drawn], [draws[row] for row in drawn]), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, draws: Sequence[Draws]) -> list[int]:
    """By the inverse of the cumulative distribution: a sum over 200,000 tokens, hence float64."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    temperature = column([draw.temperature for draw in draws])
    p = (logits.double() / temperature).softmax(-1)
    order = None
    if any(draw.top_p < 1 for draw in draws):
        p, order = p.sort(dim=-1, descending=True)
        top_p = column([draw.top_p for draw in draws])
        # The smallest set that holds top_p: tokens before which less than that has been gathered.
        outside = p.cumsum(-1) - p >= top_p
        outside[:, 0] = False
        p = p.masked_fill_(outside, 0)
    reached = p.cumsum(-1)
    target = column([draw.next() for draw in draws]) * reached[:, -1:]
    place = torch.searchsorted(reached, target, right=True)
    if order is not None:
        place = order.gather(1, place)
    drawn: list[int] = place[:, 0].tolist()
    return drawn


def score(logits: Tensor, token: int, sampling: Sampling) -> Scored | None:
    """Log-probabilities under `logits [V]` for those who asked for them."""
    count = sampling.top_logprobs
    if count is None:
        return None
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = [(int(i), _finite(float(v))) for v, i in zip(values, ids, strict=True)]
    return Scored(_finite(float(logprobs[token])), top)


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI's API says of the impossible."""
    return logprob if math.isfinite(logprob) else -9999.0
