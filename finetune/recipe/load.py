"""From a YAML file, its parent and the command line's overrides to one checked `Recipe`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from finetune.errors import FinetuneError
from finetune.recipe.paths import resolve_paths
from finetune.recipe.places import Key, Place, Tree, parse, parse_value
from finetune.recipe.sentences import sentences
from finetune.recipe.specs import Recipe

_DATA = (".jsonl", ".ndjson", ".csv", ".parquet", ".gz")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: its parent goes over the defaults, the file over its parent, `overrides` over all.

    Raises:
        FinetuneError: whatever is wrong, a line for each mistake, with its file and line (or override).
    """
    tree = _read(Path(path), ())
    for override in overrides:
        _override(tree, override)
    resolve_paths(tree)
    try:
        recipe = Recipe.model_validate(tree.value)
    except ValidationError as error:
        first, *others = sentences(error, tree)
        raise FinetuneError("\n".join([first.sentence, *map(str, others)]), at=first.at) from None
    recipe._source = Path(path).resolve()
    recipe._tree = tree
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, no parent. `load_recipe` reads an equal recipe from it."""
    yaml, out = YAML(typ="rt", pure=True), io.StringIO()
    yaml.width = 110
    yaml.representer.add_representer(str, _represented)
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def _represented(representer: Any, text: str) -> Any:
    """Text as ruamel writes it, but quoted where it holds a line break of YAML 1.1, which it would fold."""
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029") else None
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _read(path: Path, children: tuple[Path, ...]) -> Tree:
    """A file merged over its parent; `children` are the files that led here."""
    if path.suffix in _DATA and path.is_file():
        raise FinetuneError("this is data, and a recipe is YAML; `finetune data` shows it", at=str(path))
    try:
        tree = parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise FinetuneError("there is no such recipe file", at=str(path)) from None
    except IsADirectoryError:
        raise FinetuneError("this is a folder; name the recipe file in it", at=str(path)) from None
    except UnicodeDecodeError as error:
        number = 1 + error.object[: error.start].count(b"\n")
        raise FinetuneError("a recipe is UTF-8 text, and this is not", at=f"{path}:{number}") from error
    except OSError as error:
        raise FinetuneError(f"this recipe cannot be read: {error.strerror}", at=str(path)) from error
    if not isinstance(tree.value, dict):
        raise FinetuneError("a recipe is a mapping of keys to values, as in `name: my-run`", at=f"{path}:1")
    if "extends" not in tree.value:
        return tree
    place, parent = str(tree.place(("extends",))), tree.value.pop("extends")
    if not isinstance(parent, str):
        raise FinetuneError("extends: must name one recipe file", at=place)
    # os.path, unlike pathlib, leaves ~nobody and a name that is too long as they are.
    parent_path = path.parent / os.path.expanduser(parent)
    if not os.path.isfile(parent_path):
        raise FinetuneError(f"extends: there is no recipe file {parent_path}", at=place)
    line = (*children, path)
    if parent_path.resolve() in {file.resolve() for file in line}:
        circle = " -> ".join(map(str, (*line, parent_path)))
        raise FinetuneError(f"extends: these recipes extend each other in a circle: {circle}", at=place)
    merged = _read(parent_path, line)
    _merge(merged, tree)
    return merged


def _merge(below: Tree, above: Tree) -> None:
    """Lay `above` over `below`, in place: mappings merge, anything else replaces."""

    def lay(over: dict[str, Any], under: dict[str, Any], key: Key) -> None:
        for name, value in over.items():
            here = (*key, name)
            if isinstance(value, dict) and isinstance(under.get(name), dict):
                lay(value, under[name], here)
            else:
                below.forget(here)
                under[name] = value

    lay(above.value, below.value, ())
    below.places.update(above.places)


def _override(tree: Tree, text: str) -> None:
    """Set one `dotted.key=value`; a number in the key picks an item of a list."""
    dotted, equals, value = text.partition("=")
    place = Place(None, override=text)
    if not equals or not all(dotted.split(".")):
        raise FinetuneError(
            "an override is written dotted.key=value, as in train.max_steps=100", at=str(place)
        )
    if dotted == "extends":
        raise FinetuneError("a parent is named in the recipe file, not by an override", at=str(place))
    *above, last = dotted.split(".")
    node: Any = tree.value
    key: Key = ()
    for name in above:
        key = _below(node, key, name, place)
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
            tree.places[key] = place
        node = node[key[-1]]
        if not isinstance(node, dict | list):
            said = f"{_dotted(key)} is a single value and has no keys below it"
            raise FinetuneError(said, at=str(place))
    key = _below(node, key, last, place)
    tree.forget(key)
    node[key[-1]] = parse_value(value, place)
    tree.places[key] = place


def _below(node: Any, key: Key, name: str, place: Place) -> Key:
    """The key one level below `key`, whose value is `node`."""
    if isinstance(node, dict):
        return (*key, name)
    if name.isdecimal() and int(name) < len(node):
        return (*key, int(name))
    said = f"{_dotted(key)} has no item {name}: its {len(node)} are numbered from 0"
    raise FinetuneError(said, at=str(place))


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))
