"""The order of dependence, and the house's limits on length: read from the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "finetune"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py")])

# What each part may import of finetune. Stages know nothing of each other: they meet in the run directory.
BELOW_STAGES = {"errors", "said", "manifest", "probe", "recipe", "rundir", "chat", "data", "model"}
ALLOWED = {
    "errors": set[str](),
    "said": set[str](),
    "manifest": {"errors"},
    "probe": {"errors", "chat"},
    "chat": {"errors"},
    "recipe": {"errors"},
    "rundir": {"errors", "recipe"},
    "data": {"errors", "recipe", "chat"},
    "model": {"errors", "rundir"},
    "train": BELOW_STAGES,
    "evaluate": BELOW_STAGES,
    "export": BELOW_STAGES,
    "serve": BELOW_STAGES,
    "report": BELOW_STAGES,
    "predict": BELOW_STAGES - {"rundir"},
    "bench": BELOW_STAGES | {"predict"},
    # Makes the bundled model: a user of every stage.
    "nano": BELOW_STAGES | {"train", "evaluate", "export"},
}
ENTRY_POINTS = {"__init__", "cli", "check", "pipeline", "train/__main__"}
# Imported at the start of every command, so what they import at once must load in a moment.
LIGHT = {"__init__", "cli", "said", "check", "recipe", "errors", "rundir", "chat", "predict"}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "trl",
    "peft",
    "accelerate",
    "wandb",
    "bitsandbytes",
    "numpy",
    "fastapi",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part(path: Path) -> str:
    """`chat` for finetune/chat/render.py, `cli` for finetune/cli_show.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if first.startswith("cli") else first


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out from `finetune`"
            assert node.module
            # `from finetune import recipe` names a part as much as `from finetune.recipe import Recipe`.
            yield from (
                (f"{node.module}.{a.name}" for a in node.names)
                if node.module == "finetune"
                else [node.module]
            )


def at_import_time(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_part_imports_only_what_is_below_it(path: Path) -> None:
    here = part(path)
    if here in ENTRY_POINTS or path.relative_to(PACKAGE).with_suffix("").as_posix() in ENTRY_POINTS:
        return
    ours = (name.split(".") for name in imported(ast.parse(path.read_text())) if name.startswith("finetune."))
    above = {other for _, other, *_ in ours} - ALLOWED[here] - {here}
    assert not above, f"{here} must not import {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", [path for path in SOURCES if part(path) in LIGHT], ids=name_of)
def test_what_every_command_imports_is_light(path: Path) -> None:
    heavy = {name.split(".")[0] for name in at_import_time(ast.parse(path.read_text()))} & HEAVY
    assert not heavy


@pytest.mark.parametrize("path", ALL_PYTHON, ids=name_of)
def test_files_and_functions_are_short_and_finished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"
    unfinished = [mark for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X") if mark in text]
    assert not unfinished
