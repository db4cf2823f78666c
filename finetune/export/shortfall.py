"""How much of what was learned an export lacks by its last layer, on the tokens that it is fitted to."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.export.layerwise import Network
from finetune.export.streams import Streams, Version
from finetune.export.words import score_words

# A gain of fewer standard errors than this may be chance, and a share of it could be anything.
CERTAIN = 5.0


class Shortfall:
    """Of `streams` past the last layer.

    What is missing is a share of the tuned model's gain in loss over the base, as that is what the tuning was
    for. Where that gain is none or chance, it is a share of the change of the residual stream, in which token
    t counts `weight[t]`.
    """

    def __init__(self, network: Network, streams: Streams, weight: Tensor) -> None:
        self._network, self._streams, self._weight = network, streams, weight
        self._tuned = self._losses("tuned")
        gains = self._losses("base") - self._tuned
        self._gain = float(gains.mean())
        self._by_loss = len(gains) > 1 and self._gain > CERTAIN * float(gains.std()) / len(gains) ** 0.5

    def missing(self) -> float:
        """The share that is missing by now; below zero where the export does more than the tuned model."""
        if self._by_loss:
            return float((self._losses("export") - self._tuned).mean()) / self._gain
        return 1 - self._share_of_change()

    def _losses(self, version: Version) -> Tensor:
        """Of every learned token, in nats."""
        learned = self._streams.learned()
        targets = torch.cat([passage.targets for passage in self._streams.passages])[learned]
        state = self._streams.all(version)[learned.to(self._weight.device)]
        return score_words(self._network, state, targets).losses

    def _share_of_change(self) -> float:
        """The slope of the export's change on the tuned model's."""
        base = self._streams.all("base")
        wanted, made = self._streams.all("tuned") - base, self._streams.all("export") - base
        square = (self._weight @ wanted.square()).sum().clamp(min=1e-30)
        return float((self._weight @ (wanted * made)).sum() / square)
