"""Tokenised data on disk: flat files under a fingerprint of all that they depend on.

An entry is a folder, written under a temporary name and renamed when complete, so that it is whole or not
there whatever is killed, and two processes that prepare the same data at once both end with the same entry.
Each file's sha256 is kept and checked when the entry is opened; an entry that does not match is made again.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import finetune
from finetune.data.examples import Examples
from finetune.data.read import hub_identity, source_files
from finetune.data.report import Counts
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.chat import HarmonyEncoder
    from finetune.data.tokenise import Chunk
    from finetune.recipe import DataSpec, Source

_FILES = {"ids": np.int32, "learn": np.uint8, "lengths": np.int64, "keys": np.uint64}
# Nobody prepares for two days: a temporary folder that old was left by a process that was killed.
_STALE_SECONDS = 2 * 24 * 3600


@dataclass(frozen=True)
class Stored:
    """Examples with their question keys (uint64 [examples]), the counts of the rows they came from, and a
    sha256 (hex) of the tokens themselves."""

    examples: Examples
    keys: NDArray[np.uint64]
    counts: Counts
    fingerprint: str


def entry_name(sources: list[Source], spec: DataSpec, encoder: HarmonyEncoder) -> str:
    """A hash of the rows' bytes, the settings they are read with, the tokenizer and this package's code."""
    settings = spec.model_dump(mode="json", exclude={"train", "held_out", "cache", "workers", "streaming"})
    depends = {
        "code": _code_hash(),
        "tokenizer": sha256(encoder.tokenizer.to_str().encode()).hexdigest(),
        "settings": settings,
        "sources": [_identity(source) for source in sources],
    }
    return sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _identity(source: Source) -> dict[str, Any]:
    settings = source.model_dump(mode="json", exclude={"path", "hub"})
    if source.hub:
        return settings | {"hub": hub_identity(source)}
    return settings | {"files": [_file_hash(file) for file in source_files(str(source.path))]}


def _file_hash(file: Path) -> list[str]:
    try:
        return ["".join(file.suffixes), _sha256(file)]
    except OSError as error:
        raise FinetuneError(f"this file cannot be read: {error.strerror}", at=str(file)) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _code_hash() -> str:
    """A changed renderer gives other tokens, so the sources that make the tokens are part of what the cache
    is for.
    """
    digest = sha256()
    for folder in ("chat", "data"):
        for file in sorted((Path(finetune.__file__).parent / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def write(folder: Path, chunks: Iterator[Chunk]) -> None:
    """Write the files of an entry, in memory of one chunk."""
    counts, digests = Counts(), {name: sha256() for name in _FILES}
    with ExitStack() as stack:
        streams = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _FILES}
        for chunk in chunks:
            counts.add_chunk(chunk)
            for name, stream in streams.items():
                part = getattr(chunk, name).tobytes()
                digests[name].update(part)
                stream.write(part)
    entry = {
        "sha256": {name: digest.hexdigest() for name, digest in digests.items()},
        "counts": asdict(counts),
    }
    (folder / "entry.json").write_text(json.dumps(entry), encoding="utf-8")


def read(folder: Path) -> Stored | None:
    """Open an entry; None when there is none, or it is not what was written."""
    try:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        if any(_sha256(folder / f"{name}.bin") != entry["sha256"][name] for name in _FILES):
            return None
        arrays = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _FILES.items()}
        counts = Counts.from_dict(entry["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"])])
    fingerprint = sha256(json.dumps(entry["sha256"], sort_keys=True).encode()).hexdigest()
    return Stored(
        Examples(arrays["ids"], arrays["learn"], offsets), np.array(arrays["keys"]), counts, fingerprint
    )


def _mapped(file: Path, dtype: Any) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(file, dtype, mode="r")) if file.stat().st_size else np.zeros(0, dtype)


@contextmanager
def new_entry(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder that becomes `parent/name` when the block ends well, and is removed when it does
    not.

    Raises:
        FinetuneError: the disk is full, or the folder may not be written to.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent)
        folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
        try:
            yield folder
            _put_in_place(folder, parent / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "there is no space left for the prepared data (5 bytes a token)" if full else error.strerror
        raise FinetuneError(f"the data cache cannot be written: {reason}", at=str(parent)) from error


def _put_in_place(folder: Path, place: Path) -> None:
    try:
        folder.rename(place)
    except OSError:
        if (
            read(place) is None
        ):  # what is there is broken; otherwise another process was first, with the same bytes
            shutil.rmtree(place)
            folder.rename(place)


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(".tmp-*"):
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
