"""What the README says can be done can be done."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from finetune.chat import read_conversation
from finetune.cli import app
from finetune.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [text for spoken, text in fenced if spoken == language]


def finetune_commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(finetune [^`]*)`", TEXT)
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("finetune ")]


def test_every_command_exists_and_takes_the_options_it_is_shown_with() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = finetune_commands()
    assert len(shown) > 10
    for name, *words in shown:
        options = {flag for parameter in known[name].params for flag in parameter.opts}
        ours = words[: words.index("--")] if "--" in words else words
        assert {word for word in ours if word.startswith("-")} <= options
    assert {name for name, *_ in shown} == set(known), "the README shows every command"


@pytest.mark.parametrize("words", [w for w in finetune_commands() if any("=" in word for word in w)])
def test_every_override_shown_is_one_that_a_recipe_takes(words: list[str]) -> None:
    ours = words[: words.index("--")] if "--" in words else words
    load_recipe(ROOT / ours[1], ours[2:])


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\b(?:recipes|configs|tests|finetune)/[\w/.-]+\.(?:yaml|py)", TEXT)
    tree = next(block for block in blocks("") if block.startswith("finetune/"))
    folder = ""
    for line in tree.splitlines():
        entry = line.split()[0]
        folder = entry if not line.startswith(" ") else folder
        named.append(entry if not line.startswith(" ") else folder + entry)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)", TEXT)) | set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_recipe_and_the_row_that_are_shown_can_be_read(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.replace("../base", str(ROOT / "recipes" / "base")))
    assert load_recipe(file).name == "support-style"
    (row,) = blocks("json")
    assert read_conversation(json.loads(row)).messages[-1].thinking == "Simple."


def test_every_dependency_is_pinned_by_a_name_and_a_plain_version() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert re.fullmatch(r"[\w.]+", version), line
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(w for ws in project["optional-dependencies"].values() for w in ws)]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", w)[0]).lower() for w in wanted}
    assert names <= set(pins)
