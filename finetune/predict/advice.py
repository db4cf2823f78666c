"""The smallest change to a recipe that makes it fit, of the settings that save memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune.recipe import Recipe

# A pass shorter than this leaves the experts with too few rows to be worth decoding.
SHORTEST_PASS = 512
LOWEST_RANK = 4


@dataclass(frozen=True)
class Change:
    """Overrides as one types them; `enough` is False where even all of them do not make it fit."""

    overrides: list[str]
    bytes: float
    enough: bool


def smallest_change(recipe: Recipe, need: Callable[[Recipe], float], memory: float) -> Change:
    """One setting where one is enough, else several together.

    Those that change nothing of what is learned come first, then those that change how, then what.
    """
    for ladder in _LADDERS:
        for override, other in ladder(recipe):
            if need(other) <= memory:
                return Change(override.split(), need(other), True)
    taken: dict[str, str] = {}
    while need(recipe) > memory:
        rungs = [rung for ladder in _LADDERS for rung in itertools.islice(ladder(recipe), 1)]
        saving = {override: other for override, other in rungs if need(other) < need(recipe)}
        if not saving:
            break
        override = min(saving, key=lambda one: need(saving[one]))
        recipe = saving[override]
        taken |= {words.split("=")[0]: words for words in override.split()}
    return Change(list(taken.values()), need(recipe), need(recipe) <= memory)


def _changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: part})


def _checkpointing(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if not recipe.train.gradient_checkpointing:
        yield (
            "train.gradient_checkpointing=true",
            _changed(recipe, "train", gradient_checkpointing=True),
        )


def _attending_again(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if recipe.train.keep_attention:
        yield "train.keep_attention=0", _changed(recipe, "train", keep_attention=0)


def _shorter_passes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    tokens = recipe.tokens_per_pass
    shortest = max(SHORTEST_PASS, recipe.data.max_tokens)
    while tokens > shortest:
        tokens = max(tokens // 2, shortest)
        yield f"train.tokens_per_pass={tokens}", _changed(recipe, "train", tokens_per_pass=tokens)


def _optimizer(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if recipe.train.optimizer == "adamw":
        yield "train.optimizer=adamw_8bit", _changed(recipe, "train", optimizer="adamw_8bit")


def _offloading(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if not recipe.train.offload_activations:
        yield "train.offload_activations=true", _changed(recipe, "train", offload_activations=True)


def _dense(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    for dense in {"float32": ["bf16", "nf4"], "bf16": ["nf4"]}.get(recipe.model.dense, []):
        yield f"model.dense={dense}", _changed(recipe, "model", dense=dense)


def _experts_on_host(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    if recipe.model.experts_on != "host":
        yield "model.experts_on=host", _changed(recipe, "model", experts_on="host")


def _rank(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    rank = recipe.lora.rank
    while rank > LOWEST_RANK:
        rank = max(rank // 2, LOWEST_RANK)
        yield f"lora.rank={rank}", _changed(recipe, "lora", rank=rank)


def _shorter_examples(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Where examples are what keeps a pass from being shorter, which holds one of them at least."""
    tokens = recipe.data.max_tokens
    while recipe.tokens_per_pass == recipe.data.max_tokens and tokens > SHORTEST_PASS:
        tokens = max(tokens // 2, SHORTEST_PASS)
        shorter = _changed(_changed(recipe, "data", max_tokens=tokens), "train", tokens_per_pass=tokens)
        yield f"data.max_tokens={tokens} train.tokens_per_pass={tokens}", shorter


_LADDERS = (
    _checkpointing, _attending_again, _shorter_passes, _optimizer, _offloading, _dense, _experts_on_host,
    _rank, _shorter_examples,
)  # fmt: skip
