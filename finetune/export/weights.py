"""The weights of a tuned model, an expert or a span of rows at a time: base plus adapter, rounded to bf16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from finetune.export.merge import Deltas
from finetune.export.subject import Subject
from finetune.export.tensors import Checkpoint, spans
from finetune.model.expert_layer import Factors
from finetune.model.mxfp4 import dequantise_mxfp4


class Weights:
    """Reads a subject's weights; nothing larger than an expert is held, except the factors of a layer."""

    def __init__(self, subject: Subject) -> None:
        self.checkpoint = Checkpoint(subject.base.path)
        tuned = subject.tuned
        self._deltas = Deltas(tuned.adapter, self.checkpoint.info.experts) if tuned else None
        # Experts come one after the other: the factors of the parameter at hand are permuted once.
        self._expert_factors = lru_cache(maxsize=2)(self._find_expert_factors)
        self._changed: set[tuple[str, int]] = set()

    @property
    def changed_experts(self) -> int:
        """How many of the expert weights read so far differ from the base's after rounding, zeros apart."""
        return len(self._changed)

    def _find_expert_factors(self, name: str) -> Factors | None:
        return self._deltas.experts(name) if self._deltas else None

    def expert(self, name: str, number: int) -> Tensor:
        """One expert of `...mlp.experts.gate_up_proj` or `...down_proj`, bf16 `[out, in]`.

        The rows of gate and up are interleaved. Without a delta this is what MXFP4 stands for, which bf16
        holds exactly.
        """
        span = number, number + 1
        if self.checkpoint.info.kind == "mxfp4":
            blocks, scales = self.checkpoint.read_packed(name, *span)
            weight = dequantise_mxfp4(blocks, scales, torch.bfloat16)[0]
        else:
            weight = self.checkpoint.read(name, *span)[0].mT.to(torch.bfloat16)
        change = self._expert_factors(name)
        if change is None:
            return weight
        merged = torch.addmm(weight.float(), change.b[number], change.a[number]).to(torch.bfloat16)
        # What was exactly zero takes on any change, however small, and says nothing.
        if ((merged != weight) & (weight != 0)).any():
            self._changed.add((name, number))
        return merged

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of any tensor that is not an expert's weight, bf16."""
        rows = self.checkpoint.read(name, first, last)
        change = self._deltas.dense_factors(name) if self._deltas else None
        if change is None:
            return rows.to(torch.bfloat16)
        # In float64: in float32 a row by itself may come out other than among others, and be rounded apart.
        merged = torch.addmm(rows.double(), change.b[first:last].double(), change.a.double())
        return merged.to(torch.bfloat16)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The whole of a tensor that is not an expert's weight, in bf16 and in order."""
        for first, last in spans(self.checkpoint.shape(name), 4):
            yield self.rows(name, first, last)
