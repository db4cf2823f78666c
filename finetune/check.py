"""`finetune check`: what a recipe resolves to, and whether its data and base are there; loads no weights."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.recipe import Recipe, Source, require_files

if TYPE_CHECKING:
    from finetune.model.checkpoint import CheckpointInfo

# Reading this many rows takes about a second; the run itself reads them all.
ROWS_LOOKED_AT = 10_000


@dataclass(frozen=True)
class FoundRows:
    """Rows of one source. `rows` were looked at, and `more` says that there are others behind them.

    `bytes` and `rows` are None for a hub data set, which is not fetched; `first_bad` says what and where.
    """

    key: str
    where: str
    bytes: int | None = None
    rows: int | None = None
    more: bool = False
    bad: int = 0
    first_bad: str | None = None


@dataclass(frozen=True)
class FoundBase:
    """The base model's checkpoint; all but `where` is None for one that is still on the hub."""

    where: str
    path: str | None = None
    kind: str | None = None
    layers: int | None = None
    experts: int | None = None
    weights: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class CheckReport:
    """Everything `finetune check` found."""

    recipe: Recipe
    base: FoundBase
    data: list[FoundRows]

    @property
    def problem(self) -> str | None:
        """Why training would stop at once, or None."""
        bad = next((found.first_bad for found in self.data if found.first_bad), None)
        return bad if self.recipe.data.bad_rows == "stop" else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "base": asdict(self.base),
            "data": [asdict(found) for found in self.data],
            "problem": self.problem,
        }


def check(recipe: Recipe) -> CheckReport:
    """Look for the base and the data of a recipe.

    Raises:
        FinetuneError: the base is missing or broken, a data file is missing, or a file cannot be read at all.
    """
    require_files(recipe)
    base = _find_base(recipe)
    sources = {f"data.train.{i}": source for i, source in enumerate(recipe.data.train)}
    if isinstance(recipe.data.held_out, list):
        sources |= {f"data.held_out.{i}": source for i, source in enumerate(recipe.data.held_out)}
    sources |= {
        f"eval.tasks.{i}": task.source()
        for i, task in enumerate(recipe.eval.tasks)
        if task.path != "held_out"
    }
    return CheckReport(recipe, base, [_look_at(key, source, recipe) for key, source in sources.items()])


def _look_at(key: str, source: Source, recipe: Recipe) -> FoundRows:
    """Read the first rows of a source as training would."""
    from finetune.data.read import read_rows, source_files
    from finetune.data.shapes import row_to_conversation

    if source.hub:
        return FoundRows(key, f"{source.hub} ({source.split}) on the hub")
    files = source_files(str(source.path))
    looked_at, bad, first_bad = 0, 0, None
    rows = read_rows(source)
    for row in itertools.islice(rows, ROWS_LOOKED_AT):
        looked_at += 1
        try:
            row_to_conversation(row, source, recipe.data)
        except FinetuneError as error:
            bad += 1
            first_bad = first_bad or str(error)
    return FoundRows(
        key=key,
        where=str(source.path),
        bytes=sum(file.stat().st_size for file in files),
        rows=looked_at,
        more=next(rows, None) is not None,
        bad=bad,
        first_bad=first_bad,
    )


def _find_base(recipe: Recipe) -> FoundBase:
    """The checkpoint behind `model.base`, without asking the hub for it."""
    from finetune.model.places import resolve

    name = recipe.model.base
    try:
        if name != "nano" and not Path(name).exists():
            cached = _in_hub_cache(name)
            return _described(name, cached) if cached else FoundBase(name)
        return _described(name, resolve(name).base)
    except FinetuneError as error:
        if error.at:
            raise
        raise FinetuneError(f"model.base: {error.sentence}", at=recipe.at("model", "base")) from None


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        config = None
        looks_like_id = False
    else:
        looks_like_id = name.count("/") == 1
    if not looks_like_id:
        raise FinetuneError(f"there is no model {name}: no folder of that name, and no hub id (owner/name)")
    return Path(config).parent if isinstance(config, str) else None


def _described(name: str, path: Path) -> FoundBase:
    from finetune.model.checkpoint import inspect_checkpoint

    info: CheckpointInfo = inspect_checkpoint(path)
    return FoundBase(name, str(path), info.kind, info.layers, info.experts, info.weights, info.bytes)
