"""Every recipe and accelerate file that ships: it loads, and explains each of its keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.predict import RELEASED, gpu, predict
from finetune.recipe import dump_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
# How nano itself is made is a recipe of another kind: finetune.nano.spec.
PRETRAIN = ROOT / "recipes" / "nano" / "pretrain.yaml"
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - {PRETRAIN})
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CARDS_OF_24_GB = ("rtx4090", "rtx3090", "l4")
# What a base leaves to the recipes that extend it.
GIVEN = ["name=given", "data.train=rows.jsonl"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_recipes_for_every_size() -> None:
    assert {"base", "gpt-oss-20b", "gpt-oss-120b"} <= {path.parent.name for path in RECIPES}
    assert {path.stem for path in CONFIGS} >= {"single", "ddp", "multinode"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_shipped_recipe_loads_and_its_dump_loads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, GIVEN if path.parent.name == "base" else [])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("recipe", "card", "most"),
    [
        ("gpt-oss-20b/16gb", "16gb", 15.5), *(("gpt-oss-20b/24gb", card, 23) for card in CARDS_OF_24_GB),
        *(("gpt-oss-120b/24gb", card, 22) for card in CARDS_OF_24_GB),
    ],
)  # fmt: skip
def test_a_recipe_for_a_small_card_is_predicted_to_fit_and_its_comment_says_the_peak(
    recipe: str, card: str, most: float
) -> None:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    loaded, machine = load_recipe(path), gpu(card)
    found = predict(loaded, RELEASED[loaded.model.base], machine)
    assert found.fits and found.memory.total < most * 1e9 < machine.memory
    said = re.search(r"predicted peak ([\d.]+) GB", path.read_text())
    assert said and found.memory.total / 1e9 <= float(said[1]) + 0.05


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_accelerate_reads_every_shipped_config(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    # The recipe's model.dense decides the dtype: autocast on top would change the computation unseen.
    assert config.mixed_precision == "no"


@pytest.mark.parametrize("path", [*RECIPES, PRETRAIN, *CONFIGS], ids=name_of)
def test_every_key_of_a_shipped_file_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        key = re.match(r"\s*(?:- )?([\w]+):(.*)", line)
        if not key:
            continue
        # A section's own comment may be that of its first key, and `extends` says all by itself.
        section_or_parent = not key[2].strip() or key[1] == "extends"
        above = number > 0 and lines[number - 1].lstrip().startswith("#")
        assert above or "#" in key[2] or section_or_parent, f"{path}:{number + 1}: {key[1]} has no comment"
