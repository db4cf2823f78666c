"""The directory of one run: what it holds, and where. Stages meet here and nowhere else.

runs/<name>-<UTC>/   recipe.yaml · run.json · metrics.jsonl · checkpoints/ · adapter/ · eval/
runs/latest       -> the newest run
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, writing
from finetune.recipe import Recipe, dump_recipe, load_recipe

_CHECKPOINT = re.compile(r"step-\d{6,}")


def cache_folder(runs: Path = Path("runs")) -> Path:
    """Where tokenised data is kept, shared by all runs of a folder: `.cache` in it, or $FINETUNE_CACHE."""
    return Path(os.environ.get("FINETUNE_CACHE") or runs / ".cache")


def recipe_of(where: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or that of a run.

    Raises:
        FinetuneError: as `load_recipe`; there is neither.
    """
    place = Path(where)
    if not place.exists():
        raise FinetuneError("there is no such recipe or run", at=str(where))
    if place.is_dir():
        RunDir.open(place)
        place /= "recipe.yaml"
    return load_recipe(place, overrides)


@dataclass(frozen=True)
class RunDir:
    """A run directory. Under several processes only the first one writes to it."""

    path: Path

    @classmethod
    def create(cls, recipe: Recipe, root: Path = Path("runs")) -> RunDir:
        """Make the directory of a new run and point `latest` at it.

        Raises:
            FinetuneError: the disk is full or the folder cannot be written to.
        """
        started = datetime.now(UTC)
        name = f"{recipe.name}-{started:%Y%m%d-%H%M%S}"
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            path = _make_new(root.resolve(), name)
            (path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        run = cls(path)
        run._write(
            {"name": recipe.name, "status": "created", "created": started.isoformat(timespec="seconds")}
        )
        with writing(root):
            link = path.parent / f".latest-{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(path.parent / "latest")
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """The run in an existing directory (`runs/latest` opens the run it points at).

        Raises:
            FinetuneError: there is no run.
        """
        if not cls.is_run(path):
            what = (
                "this folder is not a run: it has no run.json"
                if Path(path).is_dir()
                else "there is no such run"
            )
            raise FinetuneError(what, at=str(path))
        return cls(Path(path).resolve())

    @classmethod
    def all(cls, root: Path = Path("runs")) -> list[RunDir]:
        """The runs in a folder, oldest first."""
        found = (
            [cls(p) for p in root.iterdir() if cls.is_run(p) and not p.is_symlink()] if root.is_dir() else []
        )
        return sorted(found, key=lambda run: (str(run.info().get("created", "")), run.path.name))

    @staticmethod
    def is_run(path: str | Path) -> bool:
        return (Path(path) / "run.json").is_file() and (Path(path) / "recipe.yaml").is_file()

    def recipe(self) -> Recipe:
        """The recipe as it was when the run began, overrides included."""
        return load_recipe(self.path / "recipe.yaml")

    def info(self) -> dict[str, Any]:
        """What run.json says."""
        file = self.path / "run.json"
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FinetuneError(f"run.json cannot be read: {error}", at=str(file)) from error
        if not isinstance(info, dict):
            raise FinetuneError("run.json does not hold a mapping", at=str(file))
        return info

    def update(self, **fields: Any) -> None:
        """Set fields of run.json; a reader sees the old file or the new one, never half of it."""
        self._write({**self.info(), **fields})

    def _write(self, info: dict[str, Any]) -> None:
        file = self.path / "run.json"
        part = file.with_suffix(".json.part")
        with writing(file):
            part.write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(file)

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        found = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def latest_checkpoint(self) -> Path | None:
        return next(reversed(self.checkpoints()), None)

    @property
    def adapter(self) -> Path:
        """The adapter as it was at the end of training, in PEFT's layout."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: step, loss, learning_rate and so on."""
        return self.path / "metrics.jsonl"

    def last_metrics(self) -> dict[str, Any]:
        """The latest figure of each kind in metrics.jsonl; empty before the first step."""
        latest: dict[str, Any] = {}
        if self.metrics.is_file():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                # A run that was killed may leave half a line at the end.
                with suppress(ValueError):
                    latest.update(json.loads(line))
        return latest

    @property
    def cache(self) -> Path:
        """Tokenised data, which the runs beside this one share."""
        return cache_folder(self.path.parent)

    @property
    def eval_dir(self) -> Path:
        return self.path / "eval"


def _make_new(root: Path, name: str) -> Path:
    """A folder that was not there before; two runs may begin within one second."""
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
