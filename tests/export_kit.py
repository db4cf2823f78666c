"""Small bases and adapters to export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.model import add_lora, load_base, save_adapter
from tests.checkpoints import write_random_checkpoint

# Experts no power of two, widths multiples of 32 only, layers odd.
ODD: dict[str, Any] = {"hidden": 96, "layers": 3, "experts": 5, "top_k": 3, "intermediate": 160, "shards": 3}

# What judges are asked about beside nano; the second has one expert a token and a single layer.
SHAPES: dict[str, dict[str, Any]] = {
    "5-experts": {},
    "7-experts": {"hidden": 160, "layers": 1, "experts": 7, "top_k": 1, "intermediate": 224, "shards": 1},
}


def write_base(path: Path, **shape: Any) -> Path:
    """A random checkpoint with a tokenizer that has a merge, which llama.cpp asks for."""
    write_random_checkpoint(path, tokenizer="bytes", **{**ODD, **shape})
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["th"] = 300
    tokenizer["model"]["merges"] = [["t", "h"]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    (path / "LICENSE").write_text("terms of the base", encoding="utf-8")
    return path


def write_adapter(path: Path, base: Path, *, size: float = 0.05, **lora: Any) -> Path:
    """An adapter that changes everything it is on; `size` is the standard deviation of lora_B."""
    torch.manual_seed(1)
    settings = {"rank": 3, "alpha": 7.5, "rslora": True, "targets": ["attention", "experts"], **lora}
    model = add_lora(load_base(base, dtype=torch.float32, device="cpu"), **settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    save_adapter(model, path, base=base)
    return path


def write_talk(file: Path, rows: int = 60) -> Path:
    """Conversations to calibrate on, and to hold some of."""
    chats = [
        [
            {"role": "user", "content": f"what is {n} times {n + 3}?"},
            {"role": "assistant", "content": f"It is {n * (n + 3)}, as {n * n} and {3 * n} make."},
        ]
        for n in range(rows)
    ]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return file


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
