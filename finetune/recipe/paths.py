"""Which file a relative path in a recipe means."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.recipe.places import Key, Tree
from finetune.recipe.specs import Recipe


def resolve_paths(tree: Tree) -> None:
    """Make the paths of a recipe absolute, in place.

    A path that a file gives is looked for beside that file (a parent's path beside the parent), then in the
    current folder; one that an override gives in the current folder, where it was typed.
    """
    value = tree.value
    model = value.get("model")
    if isinstance(model, dict) and isinstance(model.get("base"), str):
        resolved = _absolute(model["base"], tree, ("model", "base"))
        # Anything else is a hub id or the bundled model, or is said to be missing when it is opened.
        if model["base"] != "nano" and (os.path.exists(resolved) or model["base"].startswith((".", "~"))):
            model["base"] = resolved
    data = value.get("data")
    if isinstance(data, dict):
        data.update({k: _sources(data[k], ("data", k), tree) for k in ("train", "held_out") if k in data})
    tasks = value["eval"].get("tasks") if isinstance(value.get("eval"), dict) else None
    for index, task in enumerate(tasks if isinstance(tasks, list) else []):
        if isinstance(task, dict) and isinstance(task.get("path"), str) and task["path"] != "held_out":
            task["path"] = _absolute(task["path"], tree, ("eval", "tasks", index, "path"))


def _sources(value: Any, key: Key, tree: Tree) -> Any:
    """Paths may stand alone, in a list, or under `path` (see `specs.Sources`)."""
    if isinstance(value, str):
        return _absolute(value, tree, key)
    if isinstance(value, list):
        return [_sources(item, (*key, index), tree) for index, item in enumerate(value)]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": _absolute(value["path"], tree, (*key, "path"))}
    return value


def _absolute(value: str, tree: Tree, key: Key) -> str:
    place = tree.place(key)
    try:
        path = Path(value).expanduser()
        if place and place.file and _exists(place.file.parent / path):
            path = place.file.parent / path
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # as for ~nobody, or letters that no file name has
        dotted = ".".join(map(str, key))
        raise FinetuneError(f"{dotted}: {value!r} is no path: {error}", at=str(place)) from None


def _exists(path: Path) -> bool:
    """Is there such a file or folder, or, for a pattern such as data/*.jsonl, at least one?

    os.path, unlike pathlib, finds nothing where a name is too long to be one.
    """
    return os.path.exists(path) or any(glob.iglob(str(path), recursive=True))


def require_files(recipe: Recipe) -> None:
    """Check that every file a recipe names is there.

    Raises:
        FinetuneError: the first one that is missing, with the line that names it.
    """
    named: list[tuple[Key, str | None]] = [
        (("data", "train", i, "path"), source.path) for i, source in enumerate(recipe.data.train)
    ]
    if isinstance(recipe.data.held_out, list):
        named += [(("data", "held_out", i, "path"), s.path) for i, s in enumerate(recipe.data.held_out)]
    named += [(("eval", "tasks", i, "path"), task.path) for i, task in enumerate(recipe.eval.tasks)]
    for key, path in named:
        if path is not None and path != "held_out" and not _exists(Path(path)):
            dotted = ".".join(map(str, key))
            raise FinetuneError(f"{dotted}: there is no file {path}", at=recipe.at(*key))
