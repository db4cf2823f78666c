"""`finetune check`: what a recipe resolves to, what training would stop at and take; loads no weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.recipe import Recipe, Source, Task, require_files

if TYPE_CHECKING:
    from finetune.chat import HarmonyEncoder, Segment
    from finetune.data import Row
    from finetune.model.checkpoint import CheckpointInfo
    from finetune.predict import Lengths, Machine, Prediction, Shape

# Reading this many rows takes about a second; the run itself reads them all.
ROWS_LOOKED_AT = 10_000


@dataclass(frozen=True)
class FoundRows:
    """Rows of one source. `rows` were looked at, and `more` says that there are others behind them.

    `usable` counts the examples (of a task: the questions) in them. `bytes` and `rows` are None for a hub
    data set, which is not fetched; `first_bad` says what and where, `stop` why training would stop there;
    `share` is that of the rows which were looked at, as far as the files tell.
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
    share: float = 1.0


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
    shape: Shape | None = None


@dataclass(frozen=True)
class CheckReport:
    """Everything `finetune check` found. `prediction` is None where `unpredicted` says why."""

    recipe: Recipe
    base: FoundBase
    data: list[FoundRows]
    prediction: Prediction | None = None
    unpredicted: str | None = None

    @property
    def problem(self) -> str | None:
        """Why training would stop, or None."""
        stops = next((found.stop for found in self.data if found.stop), None)
        train = [found for found in self.data if found.key.startswith("data.train.")]
        if stops:
            return stops
        if not any(found.usable or found.more or found.rows is None for found in train):
            return f"{train[0].where}: no example is left to learn from; all rows are bad or too long"
        if self.prediction is None or self.recipe.train.force_memory:
            return None
        return self.prediction.shortage

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "base": asdict(self.base),
            "data": [asdict(found) for found in self.data],
            "problem": self.problem,
            "prediction": self.prediction.to_dict() if self.prediction else None,
            "unpredicted": self.unpredicted,
        }


def check(recipe: Recipe, *, gpu: str | None = None, price: float | None = None) -> CheckReport:
    """Look for the base, the packages and the data of a recipe, read the first rows as training would, and
    predict what training takes: on this machine, or on one with a `gpu` of the table, at a `price` an hour.

    Raises:
        FinetuneError: the base or its tokenizer is missing or broken, a package or a data file is missing, a
            file cannot be read at all, or the table has no such GPU.
    """
    from finetune.predict import gpu as gpu_of_table
    from finetune.predict import this_machine

    # A mistyped name is said before anything is read.
    machine = gpu_of_table(gpu) if gpu else None
    report, lengths = _look(recipe, elsewhere=gpu is not None)
    if report.problem:
        return report
    try:
        prediction = _predict(report, lengths, machine or this_machine(recipe.model.computes_in), price)
    except FinetuneError as error:
        return replace(report, unpredicted=str(error))
    return replace(report, prediction=prediction)


def _predict(report: CheckReport, lengths: Lengths, machine: Machine, price: float | None) -> Prediction:
    """Raises FinetuneError where the base's sizes are not known yet."""
    from finetune.predict import predict

    if report.base.shape is None:
        raise FinetuneError(f"what it takes is known once {report.base.where} is on this machine")
    sample = lengths.sample(report.recipe, _share_looked_at(report))
    return predict(report.recipe, report.base.shape, machine, sample, price)


def _share_looked_at(report: CheckReport) -> float:
    """The share of the training data that was looked at, as far as files tell."""
    train = [found for found in report.data if found.key.startswith("data.train.")]
    return min((found.share for found in train), default=1.0)


def _look(recipe: Recipe, *, elsewhere: bool) -> tuple[CheckReport, Lengths]:
    """Everything but the prediction; `elsewhere`: it is not this machine that has to have the base."""
    from finetune.predict import Lengths
    from finetune.train.surroundings import wanted_packages

    require_files(recipe)
    for package, (section, key, value) in wanted_packages(recipe).items():
        if find_spec(package) is None and not elsewhere:
            sentence = f"{section}.{key}: {value} needs the package {package}, which is not installed"
            raise FinetuneError(sentence, at=recipe.at(section, key))
    base, encoder = _find_base(recipe, elsewhere)
    lengths = Lengths(encoder)
    sources = {f"data.train.{i}": source for i, source in enumerate(recipe.data.train)}
    if isinstance(recipe.data.held_out, list):
        sources |= {f"data.held_out.{i}": source for i, source in enumerate(recipe.data.held_out)}
    found = [_look_at(key, source, recipe, encoder, lengths) for key, source in sources.items()]
    tasks = {f"eval.tasks.{i}": task for i, task in enumerate(recipe.eval.tasks) if task.path != "held_out"}
    found += [_ask(key, task, recipe) for key, task in tasks.items()]
    return CheckReport(recipe, base, found), lengths


def require_ready(recipe: Recipe, *, alone: bool = True) -> None:
    """Raise FinetuneError for the first thing that training would stop at, as far as `check` sees it.

    `alone`: one process holds the whole model, so its memory can be told and has to do.
    """
    report, lengths = _look(recipe, elsewhere=False)
    if report.problem:
        raise FinetuneError(report.problem)
    if alone and report.base.shape is not None and not recipe.train.force_memory:
        from finetune.predict import require_memory

        sample = lengths.sample(recipe, _share_looked_at(report))
        require_memory(recipe, report.base.shape, sample)


def _look_at(
    key: str, source: Source, recipe: Recipe, encoder: HarmonyEncoder | None, lengths: Lengths
) -> FoundRows:
    """Read the first rows of a source as training would; without an encoder their lengths are not known."""
    from finetune.data.tokenise import fit, render_row

    spec = recipe.data
    long: list[str] = []

    def usable(row: Row) -> int:
        """How many examples of a row would be learned from."""
        _, examples = render_row(row, source, spec)
        fitting = 0
        for example in examples:
            if key.startswith("data.train."):
                lengths.note(example)
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
    size, more = sum(file.stat().st_size for file in files), next(rows, None) is not None
    return FoundRows(
        key=key,
        where=str(source.path),
        bytes=size,
        rows=counted,
        more=more,
        bad=bad,
        first_bad=first_bad,
        usable=in_use,
        stop=first_bad if recipe.data.bad_rows == "stop" else None,
        share=_lines_share(files[0], counted, size) if more else 1.0,
    )


def _lines_share(file: Path, lines: int, size: int) -> float:
    """The share of `size` bytes that the first lines of a file of lines have; 1 for files of another kind."""
    if file.suffix not in (".jsonl", ".ndjson"):
        return 1.0
    with file.open("rb") as opened:
        return min(1.0, sum(len(line) for line in itertools.islice(opened, lines)) / size)


def _find_base(recipe: Recipe, elsewhere: bool) -> tuple[FoundBase, HarmonyEncoder | None]:
    """The checkpoint behind `model.base` and its tokenizer, without asking the hub for them."""
    from finetune.model.places import resolve

    name = recipe.model.base
    try:
        if name != "nano" and not Path(name).exists():
            return _on_hub(name, elsewhere)
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


def _on_hub(name: str, elsewhere: bool) -> tuple[FoundBase, HarmonyEncoder | None]:
    from huggingface_hub import constants, try_to_load_from_cache

    from finetune.model.places import check_hub_id, not_to_be_had
    from finetune.predict import RELEASED

    check_hub_id(name)
    config = try_to_load_from_cache(name, "config.json")
    try:
        if isinstance(config, str):
            return _described(name, Path(config).parent)
    except FinetuneError:
        # A part of it is here, and the run fetches the rest.
        if constants.HF_HUB_OFFLINE:
            raise
    if constants.HF_HUB_OFFLINE and not (elsewhere and name in RELEASED):
        raise not_to_be_had(name)
    return FoundBase(name, shape=RELEASED.get(name)), None


def _described(name: str, path: Path) -> tuple[FoundBase, HarmonyEncoder]:
    from finetune.chat import HarmonyEncoder
    from finetune.model.checkpoint import inspect_checkpoint
    from finetune.predict import Shape

    info: CheckpointInfo = inspect_checkpoint(path)
    encoder = HarmonyEncoder.from_dir(path)
    words, room = encoder.tokenizer.get_vocab_size(), info.config["vocab_size"]
    if words > room:
        sentence = f"this tokenizer has {words:,} tokens, and the model beside it knows only {room:,}"
        raise FinetuneError(sentence, at=str(path / "tokenizer.json"))
    shape = Shape.of(info.config, packed=info.kind == "mxfp4")
    found = FoundBase(name, str(path), info.kind, info.layers, info.experts, info.weights, info.bytes, shape)
    return found, encoder
