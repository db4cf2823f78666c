"""What is exported: a base, and the adapter on it where there is one, checked before anything is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.export.peft_files import WEIGHTS, Adapter, Sizes, check, complete, expert_deltas
from finetune.manifest import MANIFEST, sha256
from finetune.model import fingerprint, resolve
from finetune.model.places import ADAPTER_FILE, BASE_RECORD, adapter_base
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to: as the user named it, and where its files are."""

    name: str
    path: Path


@dataclass(frozen=True)
class Tuned:
    """An adapter that fits its base: as trained, and completed with zeros for a lone expert parameter."""

    folder: Path
    trained: Adapter
    adapter: Adapter
    deltas: Tensor  # norms, [expert parameters of all layers, experts]


@dataclass(frozen=True)
class Subject:
    """A model to export; `tuned` is None for a base alone or a merged directory."""

    base: Base
    fingerprint: str
    tuned: Tuned | None
    run: RunDir | None

    def facts(self) -> dict[str, Any]:
        """What finetune_export.json says of the source."""
        facts: dict[str, Any] = {"base": {"name": self.base.name, "fingerprint": self.fingerprint}}
        if self.tuned:
            facts["source"] = {
                "run": self.run.path.name if self.run else None,
                "adapter": self.tuned.folder.name,
                "adapter_sha256": sha256(self.tuned.folder / WEIGHTS),
            }
            return facts
        facts["source"] = None
        before = self.base.path / MANIFEST
        if before.is_file():
            # A merged directory in yet another layout: where it came from is told along.
            try:
                manifest = json.loads(before.read_text(encoding="utf-8"))
                facts["made_from"] = {key: manifest[key] for key in ("format", "base", "source")}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FinetuneError(f"this record cannot be read: {error!r}", at=str(before)) from error
        return facts


def find_subject(where: str | Path, base: str | None) -> Subject:
    """The model that `where` names: a run, an adapter, a run's checkpoint, or a model without an adapter.

    Raises:
        FinetuneError: nothing is there, a run has no adapter yet, or the adapter does not fit its base.
    """
    place = Path(where)
    # A checkpoint lies two levels inside its run.
    around = (place, *place.resolve().parents[:2])
    run = next((RunDir.open(path) for path in around if RunDir.is_run(path)), None)
    folder = run.adapter if run and RunDir.is_run(place) else place
    if (folder / "adapter_config.json").is_file():
        name = base or (run.recipe().model.base if run else adapter_base(folder))
        found = Base(name, resolve(name).base)
        mark = fingerprint(found.path)
        return Subject(found, mark, open_adapter(folder, found, mark), run)
    if folder != place:
        raise FinetuneError(
            f"there is no finished adapter here; finetune train {where} goes on with it", at=str(place)
        )
    if base is not None or (place / ADAPTER_FILE).is_file():
        raise FinetuneError(
            "there is no finished adapter here (adapter_config.json is missing)", at=str(place)
        )
    found = Base(str(where), resolve(where).base)
    return Subject(found, fingerprint(found.path), None, None)


def open_adapter(folder: Path, base: Base, mark: str) -> Tuned:
    """Read an adapter and check it against its base, whose fingerprint is `mark`.

    Raises:
        FinetuneError: it is missing, of another base, unfit, or changes no expert.
    """
    _check_base(folder, base, mark)
    sizes = Sizes.of(base.path)
    trained = Adapter.read(folder)
    check(trained, sizes, folder)
    adapter = complete(trained, sizes)
    deltas = expert_deltas(adapter, sizes.experts)
    if adapter.learns_experts and not deltas.any():
        raise FinetuneError(
            "this adapter changes no expert: the deltas of all experts are zero", at=str(folder)
        )
    return Tuned(folder, trained, adapter, deltas)


def _check_base(adapter_dir: Path, base: Base, mark: str) -> None:
    """Our adapters record the fingerprint of their base; of a stock PEFT adapter the sizes alone can tell."""
    file = adapter_dir / BASE_RECORD
    if not file.is_file():
        return
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FinetuneError(
            f"the record of the adapter's base cannot be read: {error!r}", at=str(file)
        ) from error
    if recorded != mark:
        raise FinetuneError(f"this adapter was trained on another base than {base.name}", at=str(adapter_dir))
