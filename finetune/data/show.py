"""`finetune data`: conversations as the model will see them, and what became of the rows."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat import Encoded, HarmonyEncoder
from finetune.data.prepare import prepare_data
from finetune.data.read import Row, read_rows
from finetune.data.tokenise import fit, render_row
from finetune.errors import FinetuneError
from finetune.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from finetune.data.report import DataReport

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "nano"
# A bare file is shown whole, up to what gpt-oss can take (`max_position_embeddings`).
LONGEST = 131_072
BAR = 40  # characters of the longest bar of the histogram

LEARNED, NOT_LEARNED, SPECIAL = "bold green", "default", "cyan"


@dataclass(frozen=True)
class Shown:
    """One row and its examples; none are left when it was too long."""

    row: Row
    examples: list[Encoded]


def show_data(
    where: str,
    overrides: list[str],
    *,
    cache_dir: Path,
    tokenizer: Path | None = None,
    rows: int = 3,
) -> None:
    """Print `rows` conversations of a recipe or of a data file, with what is learned marked.

    Without `tokenizer` a recipe's base gives it, and a data file is shown with the bundled model's. All rows
    are then prepared (see `prepare_data` for `cache_dir`), counted and summed up below the conversations.

    Raises:
        FinetuneError: as `load_recipe` and `prepare_data`; no tokenizer to be had.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    recipe, encoder = _opened(where, overrides, tokenizer)
    for shown in _first(recipe, encoder, rows):
        _print_row(shown, encoder, console)
    with console.status("reading all rows") as status:

        def tell(done: int, tokens: int) -> None:
            status.update(f"reading all rows: {done:,} so far, {tokens:,} tokens")

        report = prepare_data(recipe, encoder, cache_dir=cache_dir, progress=tell).report
    _print_report(report, recipe, console)


def data_lines(
    where: str, overrides: list[str], *, tokenizer: Path | None = None, rows: int | None = None
) -> Iterator[dict[str, Any]]:
    """For each example `{"line": N, "ids": [...], "learn": [0|1, ...]}`, as they come; `rows` None gives all.

    `line` is where the row begins in its file, or its number in a file without lines.
    """
    recipe, encoder = _opened(where, overrides, tokenizer)
    for shown in _first(recipe, encoder, rows):
        for example in shown.examples:
            yield {"line": shown.row.line, "ids": example.ids, "learn": example.learn}


def _opened(where: str, overrides: list[str], tokenizer: Path | None) -> tuple[Recipe, HarmonyEncoder]:
    if Path(where).suffix in (".yaml", ".yml"):
        recipe = load_recipe(where, overrides)
        return recipe, HarmonyEncoder.from_dir(tokenizer or _tokenizer_of(recipe.model.base))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        data = {
            "train": [{"path": str(Path(where).absolute())}],
            "held_out": 0.0,
            "max_tokens": LONGEST,
            "cache": False,
        }
        # JSON is YAML.
        recipe_text = json.dumps({"name": "data", "model": {"base": "nano"}, "data": data})
        file.write_text(recipe_text, encoding="utf-8")
        recipe = load_recipe(file, overrides)
    return recipe, HarmonyEncoder.from_dir(tokenizer or BUNDLED)


def _tokenizer_of(base: str) -> Path:
    """The folder of a base's tokenizer.json; from the hub only that file is fetched."""
    if base == "nano":
        return BUNDLED
    path = Path(base)
    if (path / "run.json").is_file():
        return _tokenizer_of(load_recipe(path / "recipe.yaml").model.base)
    if path.is_dir():
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base, "tokenizer.json")).parent
    except Exception as error:  # the hub, the network and the file system each raise their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FinetuneError(f"no tokenizer for {base} ({reason}); name one with --tokenizer DIR") from error


def _first(recipe: Recipe, encoder: HarmonyEncoder, rows: int | None) -> Iterator[Shown]:
    """The first rows of the training data that are not skipped."""
    spec = recipe.data
    pairs = ((row, source) for source in spec.train for row in read_rows(source, streaming=spec.streaming))
    return itertools.islice(
        (shown for row, source in pairs if (shown := _shown(row, source, recipe, encoder))), rows
    )


def _shown(row: Row, source: Any, recipe: Recipe, encoder: HarmonyEncoder) -> Shown | None:
    spec = recipe.data
    try:
        _, rendered = render_row(row, source, spec)
    except FinetuneError:
        if spec.bad_rows == "stop":
            raise
        return None
    fitting = (fit(example, spec, row.at) for example in encoder.encode_many(rendered))
    return Shown(row, [example for example in fitting if example])


def _print_row(shown: Shown, encoder: HarmonyEncoder, console: Console) -> None:
    if not shown.examples:
        console.print(f"── {shown.row.at}: dropped, too long", style="yellow", soft_wrap=True)
    for number, example in enumerate(shown.examples, 1):
        which = f", example {number} of {len(shown.examples)}" if len(shown.examples) > 1 else ""
        size, learned = len(example.ids), sum(example.learn)
        title = f"── {shown.row.at}{which}: {size:,} tokens, {learned:,} learned"
        console.print(title, style="dim", soft_wrap=True)
        text = marked(example, encoder, in_colour=console.color_system is not None)
        console.print(text.append("\n"), soft_wrap=True)


def marked(example: Encoded, encoder: HarmonyEncoder, *, in_colour: bool) -> Text:
    """The text of an example, learned tokens green and special tokens cyan; without colours, what is learned
    stands between ⟦ and ⟧."""
    from rich.text import Text

    special = set(encoder.tokenizer.get_added_tokens_decoder())
    text = Text()
    kinds = [(bool(flag), token in special) for token, flag in zip(example.ids, example.learn, strict=True)]
    was_learned, place = False, 0
    for (learned, is_special), run in itertools.groupby(kinds):
        size = len(list(run))
        if not in_colour and learned != was_learned:
            text.append("⟦" if learned else "⟧")
        style = LEARNED if learned else NOT_LEARNED
        if is_special:
            style = f"{SPECIAL} bold" if learned else f"{SPECIAL} dim"
        # An escape character in the data must not reach the terminal.
        text.append(encoder.decode(example.ids[place : place + size]).replace("\x1b", "␛"), style)
        was_learned, place = learned, place + size
    if not in_colour and was_learned:
        text.append("⟧")
    return text


def _print_report(report: DataReport, recipe: Recipe, console: Console) -> None:
    from rich.table import Table

    sums = Table(box=None, pad_edge=False)
    for column in ("", "examples", "tokens", "learned"):
        sums.add_column(column, justify="left" if not column else "right")
    for name in ("train", "held_out"):
        figures = [getattr(report, f"{name}_{what}") for what in ("examples", "tokens", "learned_tokens")]
        sums.add_row(name.replace("_", " "), *(f"{figure:,}" for figure in figures))
    console.print(sums)
    console.print(f"\n{report.rows:,} rows; the longest example has {report.longest:,} tokens")
    lengths = Table(box=None, pad_edge=False, show_header=False)
    most = max(count for _, count in report.histogram)
    for upper, count in report.histogram:
        lengths.add_row(f"up to {upper:,}", "█" * -(-count * BAR // most), f"{count:,}")
    console.print(lengths)
    limit = f"{recipe.data.max_tokens:,} tokens"
    said = {
        f"examples over {limit} were dropped": report.dropped,
        f"examples were cut at {limit} and lost the token that ends them": report.truncated,
        "held-out examples ask what is also trained on": report.repeated_questions,
    }
    for what, count in said.items():
        if count:
            console.print(f"{count:,} {what}", style="yellow")
    if report.skipped:
        console.print(f"{report.skipped:,} bad rows were skipped:", style="yellow")
        for reason, times in sorted(report.skipped_reasons.items(), key=lambda item: -item[1]):
            console.print(f"  {times:,} x {reason}")
        console.print(f"  the first at {report.skipped_places[0][0]}")
