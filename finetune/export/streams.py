"""What passes between the layers of a merge: residual streams of base, tuned model and export, in step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.data.packing import NOT_LEARNED
from finetune.export.layerwise import Layer, Network, Passage
from finetune.export.passages import Passages
from finetune.model.expert_layer import Factors

Version = Literal["base", "tuned", "export"]
VERSIONS: tuple[Version, ...] = ("base", "tuned", "export")


@dataclass
class Streams:
    """Of every version the residual stream `[L, H]` of each passage."""

    passages: Sequence[Passage]
    at: dict[Version, list[Tensor]]

    def attended(self, layer: Layer, version: Version) -> list[Tensor]:
        """One version past the layer's attention; the streams stay where they are."""
        pairs = zip(self.at[version], self.passages, strict=True)
        return [layer.attend(state, passage) for state, passage in pairs]

    def finish(
        self, layer: Layer, version: Version, attended: Sequence[Tensor], factors: Mapping[str, Factors]
    ) -> None:
        """One version through the layer's experts, from `attended` on."""
        self.at[version] = [layer.finish(state, factors) for state in attended]

    def step(self, layer: Layer, version: Version, factors: Mapping[str, Factors]) -> None:
        """One version through the layer."""
        self.finish(layer, version, self.attended(layer, version), factors)

    def all(self, version: Version) -> Tensor:
        """`[T, H]`: the passages one after the other."""
        return torch.cat(self.at[version])

    def learned(self) -> Tensor:
        """`[T]`: whether a token's successor is learned."""
        return torch.cat([passage.targets for passage in self.passages]) != NOT_LEARNED


@dataclass
class Walk:
    """All streams between two layers: those that the export is fitted to, and those it is measured on."""

    calibration: Streams
    held_out: Streams

    @classmethod
    def begin(cls, network: Network, passages: Passages) -> Walk:
        def embedded(several: Sequence[Passage]) -> Streams:
            first = [network.embed(passage) for passage in several]
            return Streams(several, {version: list(first) for version in VERSIONS})

        return cls(embedded(passages.calibration), embedded(passages.held_out))

    def resume(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Go on from the `states` of a walk with the same conversations."""
        for name, streams, version in self._parts():
            begun = zip(states[name], streams.at[version], strict=True)
            streams.at[version] = [state.to(first.device) for state, first in begun]

    def states(self) -> dict[str, list[Tensor]]:
        """All streams by name."""
        return {name: streams.at[version] for name, streams, version in self._parts()}

    def _parts(self) -> Iterator[tuple[str, Streams, Version]]:
        for version in VERSIONS:
            yield f"calibration {version}", self.calibration, version
            yield f"held-out {version}", self.held_out, version

    def __iter__(self) -> Iterator[Streams]:
        return iter((self.calibration, self.held_out))
