"""A merged checkpoint in bf16: released names, no quantisation, as transformers, vLLM and SGLang load it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.dialect import write_configs
from finetune.export.subject import Subject
from finetune.export.tensors import Planned, write_shards
from finetune.export.weights import Weights
from finetune.model import inspect_checkpoint
from finetune.model.layout import expected_tensors

EXPERT_WEIGHTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def write_bf16(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write the checkpoint's files into `folder`; returns the figures of the proof.

    Raises:
        FinetuneError: the file read back is not what was meant, or the adapter's change is lost in rounding.
    """
    weights = Weights(subject)
    config = weights.checkpoint.config
    shapes = dict(expected_tensors(config, packed=False))
    write_shards(folder, [_planned(weights, name, shape) for name, shape in shapes.items()])
    write_configs(subject.base.path, config, folder, packed=False)
    return {"tensors": len(shapes), **_proof(weights, subject, folder)}


def _planned(weights: Weights, name: str, shape: tuple[int, ...]) -> Planned:
    def pieces() -> Iterator[Tensor]:
        if name.endswith(EXPERT_WEIGHTS):
            for number in range(shape[0]):
                # Merged checkpoints hold experts as [in, out], against [out, in] in the packed ones.
                yield weights.expert(name, number).mT
        else:
            yield from weights.pieces(name)

    return Planned(name, "BF16", shape, pieces)


def _proof(weights: Weights, subject: Subject, folder: Path) -> dict[str, Any]:
    """First and last expert or row of every tensor, read by the safetensors library and computed anew."""
    compared = 0
    for name, place in inspect_checkpoint(folder).tensors.items():
        with safe_open(place.file, framework="pt") as file:
            tensor = file.get_slice(name)
            for index in {0, place.shape[0] - 1}:
                if name.endswith(EXPERT_WEIGHTS):
                    expected = weights.expert(name, index).mT
                else:
                    expected = weights.rows(name, index, index + 1)[0]
                found = tensor[index : index + 1][0]
                if not torch.equal(found, expected):
                    raise FinetuneError(f"'{name}' read back is not what was merged", at=str(place.file))
                compared += found.numel()
    proof = {"values_read_back": compared}
    tuned = subject.tuned
    if tuned and tuned.adapter.learns_experts:
        if not weights.changed_experts:
            raise FinetuneError(
                "the adapter's changes of the experts are too small for bf16: the merge equals the base"
            )
        proof["expert_weights_changed"] = weights.changed_experts
    return proof
