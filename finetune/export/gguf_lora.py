"""An adapter as llama.cpp and Ollama take it, experts included, over a GGUF of its base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.gguf import Entry, Kind, write_file
from finetune.export.gguf_layout import EXPERTS, LAYER
from finetune.export.merge import DENSE, Deltas
from finetune.export.subject import Subject, Tuned
from finetune.model.expert_layer import Factors

FILE = "adapter.gguf"
USE = f"""The base has to be a GGUF too; `finetune export BASE --to gguf` writes one.

```
llama-server -m base.gguf --lora {FILE} --jinja
```

For Ollama, in a Modelfile: `FROM ./base.gguf` and `ADAPTER ./{FILE}`.
"""


def write_gguf_lora(subject: Subject, tuned: Tuned, folder: Path) -> dict[str, Any]:
    """Write `folder`/adapter.gguf; returns the figures of the proof.

    Raises:
        FinetuneError: what was written is not what was trained.
    """
    experts = tuned.deltas.shape[1]
    alpha = float(tuned.adapter.config["lora_alpha"])
    deltas = Deltas(tuned.adapter, experts)
    tensors = dict(_tensors(deltas, _layers(tuned), alpha))
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(subject.run.recipe().name if subject.run else tuned.folder.resolve().name)
    write_file(writer, folder / FILE, [_entry(name, tensor) for name, tensor in tensors.items()])
    stored = gguf.GGUFReader(folder / FILE).tensors
    same = {one.name for one in stored} == set(tensors) and all(
        np.array_equal(one.data, tensors[one.name].numpy()) for one in stored
    )
    if not same:
        raise FinetuneError("the adapter read back differs from what was trained", at=str(folder / FILE))
    return {"tensors": len(stored), "read_back_equal": True}


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, Kind.F32, tuple(tensor.shape), lambda: iter([tensor]))


def _layers(tuned: Tuned) -> range:
    return range(1 + max(int(key.split(".layers.")[1].split(".")[0]) for key in tuned.adapter.tensors))


def _tensors(deltas: Deltas, layers: range, alpha: float) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 factor; b takes up whatever scale is not llama.cpp's alpha / r."""
    places = {released: name for name, released in LAYER.items() if released in DENSE}
    for layer in layers:
        block, here = f"blk.{layer}.", f"model.layers.{layer}."
        for released, name in places.items():
            yield from _pair(block + name, deltas.dense_factors(here + released), slice(None), alpha)
        for name, (parameter, rows) in EXPERTS.items():
            yield from _pair(f"{block}{name}.weight", deltas.experts(here + parameter), rows, alpha)


def _pair(name: str, factors: Factors | None, rows: slice, alpha: float) -> Iterator[tuple[str, Tensor]]:
    if factors is None:
        return
    rank = factors.a.shape[-2]
    b = factors.b[..., rows, :] * (rank / alpha)
    yield f"{name}.lora_a", factors.a.contiguous().to(torch.float32)
    yield f"{name}.lora_b", b.contiguous().to(torch.float32)
