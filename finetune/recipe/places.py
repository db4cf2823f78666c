"""YAML 1.2 as plain values, with the place where each key was written."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from finetune.errors import FinetuneError

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or (when `file` is None) an override."""

    file: Path | None
    line: int = 0
    override: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"override {self.override}"


@dataclass
class Tree:
    """Plain YAML values and, for each key in them, its place."""

    value: Any
    places: dict[Key, Place] = field(default_factory=dict)

    def place(self, key: Key) -> Place | None:
        """The place of a key, else of the nearest one above it."""
        for length in range(len(key), -1, -1):
            if place := self.places.get(key[:length]):
                return place
        return None

    def forget(self, key: Key) -> None:
        """Drop the places of a key and of everything below it."""
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}


def parse(text: str, file: Path) -> Tree:
    """Parse a YAML document; `file` is its name in places and errors.

    Raises:
        FinetuneError: the text is not YAML, or a mapping has a key twice.
    """
    try:
        document = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{file}:{mark.line + 1}" if mark else str(file)
        if isinstance(error, DuplicateKeyError):
            raise FinetuneError(f"{_first_line(error.problem)}; keep one of them", at=at) from error
        problem = _first_line(error.problem)
        if problem.startswith("but "):
            problem = f"{_first_line(error.context)}, {problem}"
        raise FinetuneError(f"this is not valid YAML: {problem}", at=at) from error
    except (YAMLError, ValueError, KeyError) as error:  # the last two for a date such as 2025-13-45, or a tag
        raise FinetuneError(f"this is not valid YAML: {_first_line(str(error))}", at=str(file)) from error
    except RecursionError:
        raise FinetuneError("this is nested too deep for a recipe", at=str(file)) from None
    places: dict[Key, Place] = {(): Place(file, 1)}
    try:
        return Tree(_plain(document, (), file, places), places)
    except RecursionError:
        raise FinetuneError("an anchor in this recipe holds itself", at=str(file)) from None


def parse_value(text: str, place: Place) -> Any:
    """Parse the value of an override."""
    try:
        return _plain(YAML(typ="rt", pure=True).load(text), (), Path(), {})
    except FinetuneError as error:
        raise FinetuneError(error.sentence, at=str(place)) from None
    except (YAMLError, ValueError, KeyError, RecursionError) as error:
        raise FinetuneError("the value is not valid YAML", at=str(place)) from error


def _first_line(message: str | None) -> str:
    return (message or "it cannot be read").splitlines()[0].rstrip(".")


def _plain(node: Any, key: Key, file: Path, places: dict[Key, Place]) -> Any:
    """Turn ruamel's round-trip types into plain ones, noting lines on the way."""
    if isinstance(node, CommentedMap):
        for name in node:
            # A key that comes from a merge (`<<`) has no line of its own.
            line = node.lc.key(name)[0] if name in (node.lc.data or {}) else node.lc.line
            places[(*key, name)] = Place(file, line + 1)
        return {_key(k, key, places): _plain(v, (*key, k), file, places) for k, v in node.items()}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[(*key, index)] = Place(file, node.lc.item(index)[0] + 1)
        return [_plain(v, (*key, i), file, places) for i, v in enumerate(node)]
    return _scalar(node)


def _key(name: Any, key: Key, places: dict[Key, Place]) -> str:
    if not isinstance(name, str):
        place = str(places[(*key, name)])
        raise FinetuneError(f"the key {name!r} must be text; put it in quotes", at=place)
    return str(name)


def _scalar(node: Any) -> Any:
    if node is None or isinstance(node, bool):
        return node
    for plain in (str, int, float):
        if isinstance(node, plain):
            return plain(node)
    # ruamel still reads dates, which YAML 1.2 leaves as text.
    return node.isoformat() if isinstance(node, datetime.date) else str(node)
