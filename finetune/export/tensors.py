"""Tensors read and written piece by piece, so that the size of a model never shows in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.model import inspect_checkpoint
from finetune.model.headers import INDEX_FILE, SINGLE_FILE

DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Large enough that the disk sets the pace, small enough for any machine.
PIECE_BYTES = 64 << 20
# As large as the shards of the release.
SHARD_BYTES = 4_800_000_000


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `dtype` in safetensors' words; `pieces()` gives it in order, rows first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint:
    """A checked checkpoint directory whose tensors are read by rows."""

    def __init__(self, path: Path) -> None:
        self.info = inspect_checkpoint(path)
        self.config = self.info.config

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info.tensors[name].shape

    def dtype(self, name: str) -> str:
        return self.info.tensors[name].dtype

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` of the first dimension, in memory of their own.

        Raises:
            FinetuneError: the file became shorter since it was checked.
        """
        place = self.info.tensors[name]
        last = place.shape[0] if last is None else last
        row = (place.end - place.start) // place.shape[0]
        rows = torch.empty(last - first, *place.shape[1:], dtype=DTYPES[place.dtype])
        with place.file.open("rb") as file:
            _read_ahead(file, place.start + last * row)
            file.seek(place.start + first * row)
            got = file.readinto(as_bytes(rows))
        if got != (last - first) * row:
            raise FinetuneError(f"the file ends inside the tensor '{name}'", at=str(place.file))
        return rows

    def read_packed(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Blocks and scales of experts `first` to `last` of a packed parameter."""
        blocks, scales = (self.read(f"{name}_{part}", first, last) for part in ("blocks", "scales"))
        return blocks, scales

    def copied(self, name: str, new_name: str | None = None) -> Planned:
        """The tensor as it is, perhaps under another name."""
        shape, dtype = self.shape(name), self.dtype(name)

        def pieces() -> Iterator[Tensor]:
            for first, last in spans(shape, DTYPES[dtype].itemsize):
                yield self.read(name, first, last)

        return Planned(new_name or name, dtype, shape, pieces)


def _read_ahead(file: BinaryIO, start: int) -> None:
    """Have the disk fetch what is likely to be asked for next, while this program computes."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, PIECE_BYTES, os.POSIX_FADV_WILLNEED)


def spans(shape: Sequence[int], item_bytes: int) -> Iterator[tuple[int, int]]:
    """The first dimension cut into pieces of about PIECE_BYTES."""
    rows = max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * item_bytes))
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


class Background:
    """Writes to a file and sums up what it writes, in threads of their own, while the next piece is made."""

    # Bytes that may wait, so that neither side stands still while the other's disk does.
    WAITING = 256 << 20

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self._writing, self._summing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[int], Future[None]]] = deque()
        self._bytes = 0

    def __enter__(self) -> Background:
        return self

    def write(self, content: bytes | memoryview) -> int:
        """Hand over bytes, which must not change any more; returns how many.

        Raises:
            OSError: of this write or an earlier one.
        """
        while self._bytes > self.WAITING:
            self._wait_for_one()
        written = self._writing.submit(self._stream.write, content)
        self._waiting.append((len(content), written, self._summing.submit(self._digest.update, content)))
        self._bytes += len(content)
        return len(content)

    def sha256(self) -> str:
        """The sum of all that has been handed over; raises what writing it raised."""
        while self._waiting:
            self._wait_for_one()
        return self._digest.hexdigest()

    def _wait_for_one(self) -> None:
        size, written, summed = self._waiting.popleft()
        self._bytes -= size
        written.result()
        summed.result()

    def __exit__(self, *_: object) -> None:
        for thread in (self._writing, self._summing):
            thread.shutdown(cancel_futures=True)


def write_tensor(file: BinaryIO, planned: Planned) -> None:
    """Append a tensor's bytes.

    Raises:
        FinetuneError: the pieces do not add up to the shape (a fault of this program).
        OSError: as writing does; a full disk, for one.
    """
    written = 0
    for piece in planned.pieces():
        written += file.write(as_bytes(piece.contiguous()))
    if written != planned.bytes:
        raise FinetuneError(f"'{planned.name}' came out as {written:,} bytes, not {planned.bytes:,}")


def write_safetensors(
    file: Path, tensors: Sequence[Planned], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file under a temporary name and rename it when it is whole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for planned in tensors:
        end = start + planned.bytes
        header[planned.name] = {
            "dtype": planned.dtype,
            "shape": list(planned.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for planned in tensors:
            write_tensor(stream, planned)
    part.replace(file)


def write_shards(folder: Path, tensors: Sequence[Planned]) -> None:
    """Write a checkpoint: one file, or numbered shards and their index.

    Shards that are there already are kept: they were renamed when whole, by an export that was killed.
    """
    shards: list[list[Planned]] = [[]]
    for planned in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + planned.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(planned)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys((planned.name for planned in shard), name)
        if not (folder / name).is_file():
            write_safetensors(folder / name, shard)
    if len(shards) > 1:
        total = sum(planned.bytes for planned in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
