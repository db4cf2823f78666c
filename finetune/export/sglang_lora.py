"""An adapter as SGLang takes it: one pair of 2-D factors for every expert's gate, up and down.

SGLang (0.5.10 on) refuses PEFT's stacked expert parameters and wants gate and up apart; it interleaves them
again itself. It puts LoRA on bf16 experts only, so the base must be a bf16 checkpoint, and has none for the
router.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.merge import DENSE, Deltas
from finetune.export.peft_files import CONFIG, WEIGHTS
from finetune.export.subject import Subject, Tuned
from finetune.export.tensors import Planned, write_safetensors
from finetune.model.expert_layer import Factors
from finetune.model.places import BASE_RECORD

ATTENTION = {name: place for name, place in DENSE.items() if place.startswith("self_attn.")}
EXPERTS = {
    "gate_proj": ("mlp.experts.gate_up_proj", slice(0, None, 2)),
    "up_proj": ("mlp.experts.gate_up_proj", slice(1, None, 2)),
    "down_proj": ("mlp.experts.down_proj", slice(None)),
}
USE = """The base has to be a bf16 checkpoint, as SGLang has no LoRA on MXFP4 experts;
`finetune export BASE --to bf16` writes one.

```
python -m sglang.launch_server --model-path base-bf16 --enable-lora --lora-paths tuned=.
```
"""


def write_sglang_lora(subject: Subject, tuned: Tuned, folder: Path) -> dict[str, Any]:
    """Write the adapter's files into `folder`; returns the figures of the proof.

    Raises:
        FinetuneError: the adapter trains the router, or what was written is not what was trained.
    """
    if any(".mlp.router." in key for key in tuned.adapter.tensors):
        raise FinetuneError(
            "this adapter trains the router, where SGLang has no LoRA; export a merged model instead",
            at=str(tuned.folder),
        )
    # One rank and one scale for all: smaller ranks are filled up with zeros, scales go into lora_B.
    rank = tuned.adapter.largest_rank
    deltas = Deltas(tuned.adapter, tuned.deltas.shape[1])
    layers = 1 + max(int(key.split(".layers.")[1].split(".")[0]) for key in tuned.adapter.tensors)
    tensors = dict(_tensors(deltas, layers, rank))
    write_safetensors(folder / WEIGHTS, [_planned(name, tensor) for name, tensor in tensors.items()])
    config = {
        "base_model_name_or_path": subject.base.name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    record = {"where": subject.base.name, "fingerprint": subject.fingerprint}
    (folder / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        if not all(torch.equal(stored.get_tensor(name), tensor) for name, tensor in tensors.items()):
            raise FinetuneError("the adapter read back differs from what was trained", at=str(folder))
    return {"tensors": len(tensors), "read_back_equal": True}


def _planned(name: str, tensor: Tensor) -> Planned:
    return Planned(name, "F32", tuple(tensor.shape), lambda: iter([tensor]))


def _tensors(deltas: Deltas, layers: int, rank: int) -> Iterator[tuple[str, Tensor]]:
    for layer in range(layers):
        here = f"model.layers.{layer}."
        for name, place in ATTENTION.items():
            yield from _pair(here + place, deltas.dense_factors(here + name), rank)
        for projection, (parameter, rows) in EXPERTS.items():
            found = deltas.experts(here + parameter)
            if found is None:
                continue
            for number, (a, b) in enumerate(zip(found.a, found.b, strict=True)):
                yield from _pair(f"{here}mlp.experts.{number}.{projection}", Factors(a, b[rows]), rank)


def _pair(module: str, factors: Factors | None, rank: int) -> Iterator[tuple[str, Tensor]]:
    if factors is None:
        return
    missing = rank - factors.a.shape[0]
    pad = torch.nn.functional.pad
    yield f"base_model.model.{module}.lora_A.weight", pad(factors.a, (0, 0, 0, missing)).contiguous()
    yield f"base_model.model.{module}.lora_B.weight", pad(factors.b, (0, missing)).contiguous()
