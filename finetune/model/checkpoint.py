"""What a checkpoint directory holds, read from its headers alone: configuration, tensors, shapes; no weights.

Two kinds are read, both with the released tensor names: `mxfp4` (as OpenAI released it, experts as blocks
and scales) and `bf16` (merged, experts dense as `[E, in, out]`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from finetune.errors import FinetuneError
from finetune.model.headers import INDEX_FILE, SINGLE_FILE, TensorPlace, read_headers
from finetune.model.layout import BLOCK, expected_tensors

__all__ = [
    "INDEX_FILE", "SINGLE_FILE", "CheckpointInfo", "TensorPlace", "fingerprint", "inspect_checkpoint",
]  # fmt: skip

SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "intermediate_size", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
# What our attention and expert layer, or the set of tensors, take for granted.
FIXED = {"attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": False}
PACKED_DTYPES, DENSE_DTYPES = ("U8",), ("BF16", "F16", "F32")
# A fingerprint reads this many pages of every tensor, spread evenly: 20b takes 50 ms, and any training
# moves them all.
FINGERPRINT_PAGES = 8
PAGE = 4096


@dataclass(frozen=True)
class CheckpointInfo:
    """A checked checkpoint."""

    path: Path
    kind: Literal["mxfp4", "bf16"]
    config: dict[str, Any]
    tensors: dict[str, TensorPlace]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def experts(self) -> int:
        return int(self.config["num_local_experts"])

    @property
    def bytes(self) -> int:
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @property
    def weights(self) -> int:
        """Parameters, counting every packed weight."""
        return sum(_count_weights(name, tensor) for name, tensor in self.tensors.items())


def _count_weights(name: str, tensor: TensorPlace) -> int:
    if name.endswith("_scales"):
        return 0
    count = math.prod(tensor.shape)
    return 2 * count if name.endswith("_blocks") else count


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Check configuration, shards, names, shapes, dtypes; raises FinetuneError with the first thing wrong."""
    config = _read_config(path)
    tensors = read_headers(path)
    packed = any(name.endswith("_blocks") for name in tensors)
    for key in ("hidden_size", "intermediate_size"):
        if packed and config[key] % BLOCK:
            sentence = f"'{key}' is not a multiple of {BLOCK}, the values of an MXFP4 block"
            raise FinetuneError(sentence, at=str(path / "config.json"))
    expected = set()
    for name, shape in expected_tensors(config, packed=packed):
        found = tensors.get(name)
        if found is None:
            raise FinetuneError(f"tensor '{name}' is missing from the checkpoint", at=str(path))
        if found.shape != shape:
            sizes = f"{list(found.shape)} where config.json asks for {list(shape)}"
            raise FinetuneError(f"tensor '{name}' has the shape {sizes}", at=str(found.file))
        if found.dtype not in (PACKED_DTYPES if name.endswith(("_blocks", "_scales")) else DENSE_DTYPES):
            raise FinetuneError(f"tensor '{name}' has the unexpected dtype {found.dtype}", at=str(found.file))
        expected.add(name)
    extra = sorted(set(tensors) - expected)
    if extra:
        sentence = f"the checkpoint has a tensor that gpt-oss has not: '{extra[0]}'"
        raise FinetuneError(sentence, at=str(tensors[extra[0]].file))
    return CheckpointInfo(path, "mxfp4" if packed else "bf16", config, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise FinetuneError("no config.json in the model directory", at=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise FinetuneError(f"not readable as JSON ({error})", at=str(file)) from None
    if not isinstance(config, dict):
        raise FinetuneError("not a JSON object", at=str(file))
    kind = config.get("model_type")
    if kind != "gpt_oss":
        sentence = f"this is a model of type '{kind}'; finetune trains gpt-oss models (model_type 'gpt_oss')"
        raise FinetuneError(sentence, at=str(file))
    quantisation = config.get("quantization_config") or {"quant_method": "mxfp4"}
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method != "mxfp4":
        sentence = f"quantised with '{method}'; finetune reads mxfp4 or bf16 checkpoints"
        raise FinetuneError(sentence, at=str(file))
    fault = next(_faults(config), None)
    if fault:
        raise FinetuneError(fault, at=str(file))
    return config


def _faults(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the values of a gpt-oss configuration; each check relies on those before it."""
    for key in SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            yield f"'{key}' is missing or not a whole number from 1 on"
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            yield f"'{key}' is {json.dumps(config[key])}; in gpt-oss it is {json.dumps(value)}"
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        yield "'num_attention_heads' is not a multiple of 'num_key_value_heads'"
    if config["head_dim"] % 2:
        yield "'head_dim' is odd, but rotary positions turn pairs of values"
    if config["num_experts_per_tok"] > config["num_local_experts"]:
        yield "'num_experts_per_tok' is larger than 'num_local_experts'"
    window = config.get("sliding_window", 1)
    if type(window) is not int or window < 1:
        yield "'sliding_window' is not a whole number from 1 on"
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != config["num_hidden_layers"]
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        yield "'layer_types' does not name 'sliding_attention' or 'full_attention' for each layer"


def fingerprint(path: Path) -> str:
    """A short name for these exact weights: sha256 over names, shapes and spread pages of every tensor."""
    digest = hashlib.sha256()
    with ExitStack() as files:
        streams: dict[Path, BinaryIO] = {}
        for name, place in sorted(read_headers(path).items()):
            digest.update(f"{name} {place.dtype} {place.shape}\n".encode())
            if place.file not in streams:
                streams[place.file] = files.enter_context(place.file.open("rb"))
            stream, size = streams[place.file], place.end - place.start
            for step in range(FINGERPRINT_PAGES):
                stream.seek(place.start + max(0, size - PAGE) * step // (FINGERPRINT_PAGES - 1))
                digest.update(stream.read(min(PAGE, size)))
    return digest.hexdigest()[:32]
