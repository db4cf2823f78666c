"""What a checkpoint directory holds, read from its headers alone: configuration, tensors, shapes; no weights.

Two kinds are read, both with the released tensor names: `mxfp4` (as OpenAI released it, experts as blocks
and scales) and `bf16` (merged, experts dense as `[E, in, out]`).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from finetune.errors import FinetuneError
from finetune.model.layout import expected_tensors

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A safetensors header of gpt-oss-120b is 80 kB; anything near this limit is not a header.
LARGEST_HEADER = 100_000_000
REQUIRED_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "intermediate_size", "num_local_experts",
)  # fmt: skip
# A fingerprint reads this many pages of every tensor, spread evenly: 20b takes 50 ms, and any training
# moves them all.
FINGERPRINT_PAGES = 8
PAGE = 4096


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a safetensors file; `start` and `end` are byte positions in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


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
    count = 1
    for size in tensor.shape:
        count *= size
    return 2 * count if name.endswith("_blocks") else count


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Check configuration, shards, names, shapes, dtypes; raises FinetuneError with the first thing wrong."""
    config = _read_config(path)
    tensors = _read_headers(path)
    packed = any(name.endswith("_blocks") for name in tensors)
    info = CheckpointInfo(path, "mxfp4" if packed else "bf16", config, tensors)
    expected = dict(expected_tensors(config, packed=packed))
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None:
            raise FinetuneError(f"tensor '{name}' is missing from the checkpoint", at=str(path))
        if found.shape != shape:
            sizes = f"{list(found.shape)} where config.json asks for {list(shape)}"
            raise FinetuneError(f"tensor '{name}' has the shape {sizes}", at=str(found.file))
        packed_part = name.endswith(("_blocks", "_scales"))
        if (found.dtype == "U8") != packed_part or (
            not packed_part and found.dtype not in ("BF16", "F16", "F32")
        ):
            raise FinetuneError(f"tensor '{name}' has the unexpected dtype {found.dtype}", at=str(found.file))
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise FinetuneError(f"the checkpoint has a tensor that gpt-oss has not: '{extra[0]}'", at=str(path))
    return info


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except OSError:
        raise FinetuneError("no config.json in the model directory", at=str(path)) from None
    except ValueError as error:
        raise FinetuneError(f"not readable as JSON ({error})", at=str(file)) from None
    kind = config.get("model_type")
    if kind != "gpt_oss":
        sentence = f"this is a model of type '{kind}'; finetune trains gpt-oss models (model_type 'gpt_oss')"
        raise FinetuneError(sentence, at=str(file))
    for key in REQUIRED_KEYS:
        if not isinstance(config.get(key), int):
            raise FinetuneError(f"'{key}' is missing or not a whole number", at=str(file))
    quantised = (config.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if quantised != "mxfp4":
        raise FinetuneError(
            f"quantised with '{quantised}'; finetune reads mxfp4 or bf16 checkpoints", at=str(file)
        )
    return dict(config)


def _read_headers(path: Path) -> dict[str, TensorPlace]:
    index = path / INDEX_FILE
    if not index.is_file():
        if not (path / SINGLE_FILE).is_file():
            raise FinetuneError(f"neither {INDEX_FILE} nor {SINGLE_FILE} is there", at=str(path))
        return dict(read_safetensors_header(path / SINGLE_FILE))
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(where.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FinetuneError("not a readable index of shards", at=str(index)) from None
    tensors: dict[str, TensorPlace] = {}
    for shard in shards:
        if not (path / shard).is_file():
            raise FinetuneError(
                f"shard {shard} is missing ({len(shards)} are listed in {INDEX_FILE})", at=str(path)
            )
        tensors.update(read_safetensors_header(path / shard))
    return tensors


def read_safetensors_header(file: Path) -> Iterator[tuple[str, TensorPlace]]:
    """Name and place of every tensor; raises FinetuneError for a file that is cut off or not safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else LARGEST_HEADER
        if length >= LARGEST_HEADER or 8 + length > size:
            raise FinetuneError("not a safetensors file, or cut off in its header", at=str(file))
        try:
            header = json.loads(stream.read(length))
            entries = [
                (name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise FinetuneError("its safetensors header is not readable", at=str(file)) from None
    for name, dtype, shape, start, end in entries:
        if 8 + length + end > size:
            missing = 8 + length + max(entry[4] for entry in entries) - size
            raise FinetuneError(f"the file is cut off: {missing:,} bytes are missing", at=str(file))
        yield name, TensorPlace(file, dtype, shape, 8 + length + start, 8 + length + end)


def fingerprint(path: Path) -> str:
    """A short name for these exact weights: sha256 over names, shapes and spread pages of every tensor."""
    digest = hashlib.sha256()
    with ExitStack() as files:
        streams: dict[Path, BinaryIO] = {}
        for name, place in sorted(_read_headers(path).items()):
            digest.update(f"{name} {place.dtype} {place.shape}\n".encode())
            if place.file not in streams:
                streams[place.file] = files.enter_context(place.file.open("rb"))
            stream, size = streams[place.file], place.end - place.start
            for step in range(FINGERPRINT_PAGES):
                stream.seek(place.start + max(0, size - PAGE) * step // (FINGERPRINT_PAGES - 1))
                digest.update(stream.read(min(PAGE, size)))
    return digest.hexdigest()[:32]
