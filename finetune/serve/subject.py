"""What is served: a base, the adapters over it, and the names by which requests ask for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.manifest import MANIFEST, read_manifest
from finetune.model import fingerprint, inspect_checkpoint, resolve
from finetune.model.places import ADAPTER_FILE, NANO, adapter_base
from finetune.rundir import RunDir

# Exports that this engine loads; the others are for other programs.
SERVED_FORMATS = ("adapter", "bf16", "mxfp4")


@dataclass(frozen=True)
class Subject:
    """`adapters` are directories by the name of the model that they make of the base, which is `base_name`.

    `computes_in` is the dtype that the run's recipe asks for, None where there is no run.
    """

    base: Path
    base_name: str
    base_fingerprint: str
    adapters: dict[str, Path]
    computes_in: str | None

    @property
    def names(self) -> list[str]:
        """The tuned models, then the base."""
        return [*self.adapters, self.base_name]


def find_subject(where: str, more: Mapping[str, Path]) -> Subject:
    """Find what `where` (a run, an export, an adapter or a model) and `more` adapters by name hold.

    Only headers are read, and of an export all of its files, once, to compare their sums.

    Raises:
        FinetuneError: nothing is there, a run has no adapter yet, an export is not as it was written or has
            failed its proof, or two models would have one name.
    """
    check_export(Path(where))
    run = RunDir.open(where) if RunDir.is_run(where) else None
    if run and not (run.adapter / ADAPTER_FILE).is_file():
        sentence = f"this run has no adapter yet; finetune train {where} goes on with it"
        raise FinetuneError(sentence, at=where)
    place = resolve(where)
    inspect_checkpoint(place.base)
    adapters: dict[str, Path] = {}
    base_name = where
    if place.adapter:
        base_name = adapter_base(place.adapter)
        adapters[run.recipe().name if run else place.adapter.resolve().name] = place.adapter
    for name, folder in more.items():
        check_export(folder)
        found = resolve(folder)
        if found.adapter is None:
            raise FinetuneError("there is no adapter here", at=str(folder))
        if name in adapters:
            raise FinetuneError(
                f"two adapters would be called {name!r}; give one another name: --adapter NAME=DIR"
            )
        adapters[name] = found.adapter
    base_name = _short(base_name, place.base)
    if base_name in adapters:
        raise FinetuneError(f"an adapter is called {base_name!r}, as its base is; give it another name")
    computes_in = run.recipe().model.dense if run else None
    return Subject(place.base, base_name, fingerprint(place.base), adapters, computes_in)


def check_export(folder: Path) -> None:
    """Refuse an export that is not for this engine, whose files have changed, or whose proof failed."""
    file = folder / MANIFEST
    if not file.is_file():
        return
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FinetuneError(f"this record cannot be read: {error!r}", at=str(file)) from None
    if kind not in SERVED_FORMATS:
        engine = "llama.cpp" if "gguf" in str(kind) else "sglang" if kind == "sglang-lora" else None
        hint = f"; finetune serve --engine {engine} does" if engine else ""
        raise FinetuneError(
            f"this is an export as {kind}, which this engine does not load{hint}", at=str(folder)
        )
    verified = read_manifest(folder).get("proof", {}).get("verified")
    if verified and not verified.get("passed"):
        sentence = "finetune verify found that this export is not the model it was made from; export it again"
        raise FinetuneError(sentence, at=str(folder))


def _short(name: str, base: Path) -> str:
    """A hub id or `nano` as it is; of a folder its own name."""
    if name == "nano" or base.resolve() == NANO:
        return "nano"
    return Path(name).resolve().name if Path(name).exists() else name
