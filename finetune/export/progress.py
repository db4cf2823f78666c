"""How far an unfinished merge has come, kept beside what it has written, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.export.layerwise import Passage
from finetune.export.tensors import Planned, as_bytes, write_safetensors

FILE = "progress.safetensors"


@dataclass(frozen=True)
class Reached:
    """The first `layers` layers are written; `streams` are the residual streams past them, `[L, H]` each."""

    layers: int
    counts: dict[str, int]
    streams: dict[str, list[Tensor]]


class Progress:
    """The record in `folder` of the work that `digest` tells apart from any other."""

    def __init__(self, folder: Path, digest: str) -> None:
        self._file, self._digest = folder / FILE, digest

    def keep(self, layers: int, counts: Mapping[str, int], streams: Mapping[str, Sequence[Tensor]]) -> None:
        """Replace the record, at once or not at all; what it speaks of has been written before."""
        lengths = {name: len(several) for name, several in streams.items()}
        about = {"digest": self._digest, "layers": layers, "counts": dict(counts), "streams": lengths}
        tensors = [
            Planned(f"{name} {number}", "F32", tuple(one.shape), lambda one=one: iter([one.cpu()]))  # type: ignore[misc]
            for name, several in streams.items()
            for number, one in enumerate(several)
        ]
        write_safetensors(self._file, tensors, {"about": json.dumps(about)})

    def reached(self) -> Reached | None:
        """What was kept; None where there is nothing, or only of other work."""
        try:
            with safe_open(self._file, framework="pt") as stored:
                about = json.loads(stored.metadata()["about"])
                if about["digest"] != self._digest:
                    return None
                streams = {
                    name: [stored.get_tensor(f"{name} {number}") for number in range(length)]
                    for name, length in about["streams"].items()
                }
        except (OSError, SafetensorError):
            return None
        return Reached(about["layers"], about["counts"], streams)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)


def digest_of(several: Iterable[Sequence[Passage]]) -> str:
    """A name for these conversations, in this order."""
    digest = hashlib.sha256()
    for passages in several:
        digest.update(f"{len(passages)} passages\n".encode())
        for passage in passages:
            for tensor in (passage.ids, passage.targets, passage.positions):
                digest.update(as_bytes(tensor.contiguous()))
    return digest.hexdigest()
