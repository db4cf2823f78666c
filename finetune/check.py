"""`finetune check`: what a recipe resolves to, and what training would stop at; loads no weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.recipe import Recipe, Source, Task, require_files

if TYPE_CHECKING:
    from finetune.chat import HarmonyEncoder, Segment
    from finetune.data import Row
    from finetune.model.checkpoint import CheckpointInfo

# Reading this many rows takes about a second; the run itself reads them all.
ROWS_LOOKED_AT = 10_000


@dataclass(frozen=True)
class FoundRows:
    """Rows of one source. `rows` were looked at, and `more` says that there are others behind them.

    `usable` counts the examples (of a task: the questions) in them. `bytes` and `rows` are None for a hub
    data set, which is not fetched; `first_bad` says what and where, `stop` why training would stop there.
    """

    key: str
    where: str
    bytes: int | None = None
    rows: int | None = None
    more: bool = False
    bad: int = 0
    first_bad: str | None = None
    usable: int = 0
    stop: str | None = None


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
        """Why training would stop, or None."""
        stops = next((found.stop for found in self.data if found.stop), None)
        train = [found for found in self.data if found.key.startswith("data.train.")]
        if stops or any(found.usable or found.more or found.rows is None for found in train):
            return stops
        return f"{train[0].where}: no example is left to learn from; all rows are bad or too long"

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "base": asdict(self.base),
            "data": [asdict(found) for found in self.data],
            "problem": self.problem,
        }


def check(recipe: Recipe) -> CheckReport:
    """Look for the base, the packages and the data of a recipe, and read the first rows as training would.

    Raises:
        FinetuneError: the base or its tokenizer is missing or broken, a package or a data file is missing, or
            a file cannot be read at all.
    """
    from finetune.train.surroundings import wanted_packages

    require_files(recipe)
    for package, (section, key, value) in wanted_packages(recipe).items():
        if find_spec(package) is None:
            sentence = f"{section}.{key}: {value} needs the package {package}, which is not installed"
            raise FinetuneError(sentence, at=recipe.at(section, key))
    base, encoder = _find_base(recipe)
    sources = {f"data.train.{i}": source for i, source in enumerate(recipe.data.train)}
    if isinstance(recipe.data.held_out, list):
        sources |= {f"data.held_out.{i}": source for i, source in enumerate(recipe.data.held_out)}
    found = [_look_at(key, source, recipe, encoder) for key, source in sources.items()]
    tasks = {f"eval.tasks.{i}": task for i, task in enumerate(recipe.eval.tasks) if task.path != "held_out"}
    return CheckReport(recipe, base, found + [_ask(key, task, recipe) for key, task in tasks.items()])


def require_ready(recipe: Recipe) -> None:
    """Raise FinetuneError for the first thing that training would stop at, as far as `check` sees it."""
    problem = check(recipe).problem
    if problem:
        raise FinetuneError(problem)


def _look_at(key: str, source: Source, recipe: Recipe, encoder: HarmonyEncoder | None) -> FoundRows:
    """Read the first rows of a source as training would; without an encoder their lengths are not known."""
    from finetune.data.tokenise import fit, render_row

    spec = recipe.data
    long: list[str] = []

    def usable(row: Row) -> int:
        """How many examples of a row would be learned from."""
        _, examples = render_row(row, source, spec)
        fitting = 0
        for example in examples:
            if encoder is None or _most_tokens(example) <= spec.max_tokens:
                fitting += 1
                continue
            try:
                fitting += fit(encoder.encode(example), spec, row.at) is not None
            except FinetuneError as error:
                long.append(str(error))
        return fitting

    found = _read(key, source, recipe, usable)
    return found if found.stop or not long else FoundRows(**{**vars(found), "stop": long[0]})


def _most_tokens(example: list[Segment]) -> int:
    """A bound, as a token has a byte at least: it spares most examples the encoding."""
    return sum(1 if segment.special else len(segment.text.encode()) for segment in example)


def _ask(key: str, task: Task, recipe: Recipe) -> FoundRows:
    """Read the first rows of a task as the evaluation would."""
    from finetune.data import row_to_conversation
    from finetune.evaluate.tasks import ask, no_question

    source = task.source()

    def usable(row: Row) -> int:
        return ask(row_to_conversation(row, source, recipe.data), task.metric) is not None

    found = _read(key, source, recipe, usable)
    if found.stop or found.usable or found.more:
        return found
    return FoundRows(**{**vars(found), "stop": str(no_question(task, found.rows or 0))})


def _read(key: str, source: Source, recipe: Recipe, usable: Callable[[Row], int]) -> FoundRows:
    """Count the first rows of a source and what is `usable` in them, raising FinetuneError for a bad row."""
    from finetune.data.read import read_rows, source_files

    if source.hub:
        return FoundRows(key, f"{source.hub} ({source.split}) on the hub")
    files = source_files(str(source.path))
    counted, in_use, bad, first_bad = 0, 0, 0, None
    rows: Iterator[Row] = read_rows(source)
    for row in itertools.islice(rows, ROWS_LOOKED_AT):
        counted += 1
        try:
            in_use += usable(row)
        except FinetuneError as error:
            bad += 1
            first_bad = first_bad or str(error)
    return FoundRows(
        key=key,
        where=str(source.path),
        bytes=sum(file.stat().st_size for file in files),
        rows=counted,
        more=next(rows, None) is not None,
        bad=bad,
        first_bad=first_bad,
        usable=in_use,
        stop=first_bad if recipe.data.bad_rows == "stop" else None,
    )


def _find_base(recipe: Recipe) -> tuple[FoundBase, HarmonyEncoder | None]:
    """The checkpoint behind `model.base` and its tokenizer, without asking the hub for them."""
    from finetune.model.places import resolve

    name = recipe.model.base
    try:
        if name != "nano" and not Path(name).exists():
            return _on_hub(name)
        place = resolve(name)
        if place.adapter is not None:
            raise FinetuneError(
                "this names a tuned model; a new adapter needs a base, or a model merged from the two"
            )
        return _described(name, place.base)
    except FinetuneError as error:
        if error.at:
            raise
        raise FinetuneError(f"model.base: {error.sentence}", at=recipe.at("model", "base")) from None


def _on_hub(name: str) -> tuple[FoundBase, HarmonyEncoder | None]:
    from huggingface_hub import constants, try_to_load_from_cache

    from finetune.model.places import check_hub_id, not_to_be_had

    check_hub_id(name)
    config = try_to_load_from_cache(name, "config.json")
    try:
        if isinstance(config, str):
            return _described(name, Path(config).parent)
    except FinetuneError:
        # A part of it is here, and the run fetches the rest.
        if constants.HF_HUB_OFFLINE:
            raise
    if constants.HF_HUB_OFFLINE:
        raise not_to_be_had(name)
    return FoundBase(name), None


def _described(name: str, path: Path) -> tuple[FoundBase, HarmonyEncoder]:
    from finetune.chat import HarmonyEncoder
    from finetune.model.checkpoint import inspect_checkpoint

    info: CheckpointInfo = inspect_checkpoint(path)
    encoder = HarmonyEncoder.from_dir(path)
    words, room = encoder.tokenizer.get_vocab_size(), info.config["vocab_size"]
    if words > room:
        sentence = f"this tokenizer has {words:,} tokens, and the model beside it knows only {room:,}"
        raise FinetuneError(sentence, at=str(path / "tokenizer.json"))
    found = FoundBase(name, str(path), info.kind, info.layers, info.experts, info.weights, info.bytes)
    return found, encoder
