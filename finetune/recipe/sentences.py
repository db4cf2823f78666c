"""What pydantic finds wrong, said in the user's words with the place that is wrong."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune.errors import FinetuneError
from finetune.recipe.places import Key, Tree
from finetune.recipe.specs import Recipe

_WANTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
}
_PATTERNS = {
    "current_date": "must be a date written as 2025-08-05",
    "name": "may hold letters, digits, dots, dashes and underscores, and starts with a letter or digit",
}
_METHODS = {"dpo", "grpo"}


def sentences(error: ValidationError, tree: Tree) -> list[FinetuneError]:
    """One `FinetuneError` for each mistake, in the order of the keys in `Recipe`."""
    return [_sentence(details, tree) for details in error.errors(include_url=False)]


def _sentence(details: ErrorDetails, tree: Tree) -> FinetuneError:
    key = _written_key(details["loc"], tree.value)
    context = details.get("ctx", {})
    if details["type"] == "mistake":
        key += tuple(int(part) if part.isdecimal() else part for part in context["key"].split("."))
    place = tree.place(key)
    dotted = ".".join(map(str, key))
    said = _say(details, key, context)
    return FinetuneError(f"{dotted}: {said}" if dotted else said, at=str(place) if place else None)


def _say(details: ErrorDetails, key: Key, context: Mapping[str, Any]) -> str:
    kind, value = details["type"], details["input"]
    if kind == "mistake":
        return str(context["sentence"])
    if kind == "extra_forbidden":
        known = _siblings(key)
        return "there is no such setting" + (
            _did_you_mean(str(key[-1]), known) or f"; known here are {', '.join(known)}"
        )
    if kind == "missing":
        return "this setting is missing, and has no default"
    if kind == "literal_error":
        return _choice(key, value, str(context["expected"]))
    if kind == "string_pattern_mismatch":
        return f"{_PATTERNS[str(key[-1])]}, not {_shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind in _WANTED:
        return f"{_WANTED[kind]}, not {_shown(value)}"
    bounds = {
        "greater_than": "greater than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}",
    }
    if kind in bounds:
        return f"must be {bounds[kind].format(**context)}, not {_shown(value)}"
    return details["msg"]


def _choice(key: Key, value: Any, expected: str) -> str:
    if key == ("method",) and value in _METHODS:
        return f"{value} is not there yet; sft is the one method so far"
    names = [name.strip("' ") for part in expected.split(" or ") for name in part.split(",")]
    said = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"must be {said}, not {_shown(value)}" + _did_you_mean(str(value), names)


def _did_you_mean(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value!r}"
        case int() | float():
            return f"the number {value}"
        case list():
            return "a list"
        case _:
            return "a mapping"


def _written_key(loc: tuple[int | str, ...], value: Any) -> Key:
    """The key as the user wrote it: pydantic also puts the tags of unions into a location."""
    key: list[str | int] = []
    for index, part in enumerate(loc):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
        if inside or (index == len(loc) - 1 and isinstance(part, str) and part not in ("share", "sources")):
            key.append(part)
    return tuple(key)


def _siblings(key: Key) -> list[str]:
    """The keys that the section of an unknown key has."""
    section: Any = Recipe
    for part in key[:-1]:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        section = _model_in(section)
    return list(section.model_fields)


def _model_in(annotation: Any) -> Any:
    """The one model inside `list[Model]`, `Model | None` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)
