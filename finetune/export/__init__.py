"""From a run (or a bare adapter) to a directory that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError

FORMATS = ("adapter",)


def export(
    where: str | Path, to: str, out: str | Path, *, base: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Export the run or adapter directory `where` as `to` (one of FORMATS) to the new directory `out`.

    `base` names the base of a bare adapter, and may be left out where the adapter names it itself.
    Returns what `out`/finetune_export.json says.

    Raises:
        FinetuneError: an unknown format, nothing to export, another base, or `out` exists without `force`.
    """
    if to not in FORMATS:
        raise FinetuneError(f"there is no export format {to!r}; known are {', '.join(FORMATS)}")
    from finetune.export.adapter import Base, export_adapter
    from finetune.model import resolve
    from finetune.model.places import adapter_base
    from finetune.rundir import RunDir

    place = Path(where)
    # A checkpoint lies two levels inside its run.
    around = (place, *place.resolve().parents[:2])
    run = next((RunDir.open(path) for path in around if RunDir.is_run(path)), None)
    adapter = run.adapter if run and RunDir.is_run(place) else place
    if not (adapter / "adapter_config.json").is_file():
        hint = f"; finetune train {where} goes on with it" if adapter != place else ""
        raise FinetuneError(f"there is no finished adapter here{hint}", at=str(place))
    name = base or (run.recipe().model.base if run else adapter_base(adapter))
    return export_adapter(adapter, Base(name, resolve(name).base), Path(out), run=run, force=force)
