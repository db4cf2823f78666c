"""Where the tensors of a checkpoint lie, read from the headers of its safetensors files alone.

A file is 8 bytes (the header's length), a header in JSON, and the tensors' bytes without a gap
(huggingface/safetensors, README, "Format"). Headers come from anywhere: nothing in one is believed unchecked.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A safetensors header of gpt-oss-120b is 80 kB; anything near this limit is not a header.
LARGEST_HEADER = 100_000_000
BYTES_OF = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}  # the dtypes a gpt-oss checkpoint may have


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a safetensors file; `start` and `end` are byte positions in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_headers(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of a checkpoint directory's shards; raises FinetuneError with the first thing wrong."""
    tensors: dict[str, TensorPlace] = {}
    for shard in _shards(path):
        for name, place in read_safetensors_header(path / shard):
            if name in tensors:
                raise FinetuneError(
                    f"tensor '{name}' is in {tensors[name].file.name} too", at=str(place.file)
                )
            tensors[name] = place
    return tensors


def _shards(path: Path) -> list[str]:
    index = path / INDEX_FILE
    if not index.is_file():
        if not (path / SINGLE_FILE).is_file():
            raise FinetuneError(f"neither {INDEX_FILE} nor {SINGLE_FILE} is there", at=str(path))
        return [SINGLE_FILE]
    try:
        shards: list[str] = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # A name with a folder in it could lead out of the model directory.
        strange = [shard for shard in shards if Path(shard).name != shard]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FinetuneError("not a readable index of shards", at=str(index)) from None
    if strange:
        raise FinetuneError(f"shard '{strange[0]}' is not a file name in the model directory", at=str(index))
    for shard in shards:
        if not (path / shard).is_file():
            sentence = f"shard {shard} is missing ({len(shards)} are listed in {INDEX_FILE})"
            raise FinetuneError(sentence, at=str(path))
    return shards


def read_safetensors_header(file: Path) -> Iterator[tuple[str, TensorPlace]]:
    """Name and place of every tensor; raises FinetuneError for a file that is cut off or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else LARGEST_HEADER
            text = stream.read(length) if length < LARGEST_HEADER else b""
    except OSError as error:
        raise FinetuneError(f"the file cannot be read ({error.strerror or error})", at=str(file)) from None
    if length >= LARGEST_HEADER or 8 + length > size:
        raise FinetuneError("not a safetensors file, or cut off in its header", at=str(file))
    try:
        tensors = _parse_header(text, file, first_byte=8 + length)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FinetuneError("its safetensors header is not readable", at=str(file)) from None
    _check_places(tensors, file, first_byte=8 + length, size=size)
    yield from tensors.items()


def _parse_header(text: bytes, file: Path, *, first_byte: int) -> dict[str, TensorPlace]:
    """The tensors in the order of their bytes; raises ValueError and its like for what cannot be a header."""
    tensors: dict[str, TensorPlace] = {}
    for name, entry in json.loads(text).items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, start, end)):
            raise ValueError("a dtype is a string; sizes and offsets are whole numbers from 0 on")
        tensors[name] = TensorPlace(file, dtype, shape, first_byte + start, first_byte + end)
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))


def _check_places(tensors: dict[str, TensorPlace], file: Path, *, first_byte: int, size: int) -> None:
    """The tensors must fill the file: their shapes their bytes, without overlap or gap, to the end."""
    reached = first_byte
    for name, place in tensors.items():
        if place.dtype in BYTES_OF:
            needed = math.prod(place.shape) * BYTES_OF[place.dtype]
            if needed != place.end - place.start:
                given = f"{place.end - place.start:,} bytes where its shape needs {needed:,}"
                raise FinetuneError(f"tensor '{name}' has {given}", at=str(file))
        if place.start != reached:
            raise FinetuneError(f"tensor '{name}' overlaps another or leaves a gap", at=str(file))
        reached = place.end
    if reached > size:
        raise FinetuneError(f"the file is cut off: {reached - size:,} bytes are missing", at=str(file))
    if reached < size:
        raise FinetuneError(f"the file goes on for {size - reached:,} bytes after its tensors", at=str(file))
