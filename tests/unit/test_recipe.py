"""The recipe's keys: defaults, strictness, precedence, paths, and the way back to YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.recipe import Recipe, Source, dump_recipe, load_recipe

SMALL = "name: small\nmodel: {base: nano}\ndata: {train: [{path: rows.jsonl}]}\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_name_a_base_and_data_are_enough(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert (recipe.name, recipe.method, recipe.model.dense) == ("small", "sft", "bf16")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (16, 32, ["attention", "experts"])
    assert (recipe.data.held_out, recipe.train.learning_rate, recipe.eval.tasks) == (0.05, 2e-4, [])
    assert recipe.export.formats == ["adapter"]


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002", "+2E-4"])
def test_numbers_in_every_notation_of_yaml_1_2_are_numbers(tmp_path: Path, number: str) -> None:
    file = write(tmp_path, SMALL + f"train: {{learning_rate: {number}}}\n")
    assert load_recipe(file).train.learning_rate == 2e-4
    assert load_recipe(write(tmp_path, SMALL), [f"train.learning_rate={number}"]).train.learning_rate == 2e-4


def test_on_and_off_and_dates_are_text(tmp_path: Path) -> None:
    text = SMALL.replace("]}", "], current_date: 2025-08-05}") + "tracking: {wandb: off, project: on}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.tracking.wandb, recipe.tracking.project) == ("off", "on")
    assert recipe.data.current_date == "2025-08-05"


def test_a_whole_number_may_stand_for_a_float(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, SMALL), ["train.epochs=3"]).train.epochs == 3.0


def test_overrides_go_over_the_recipe_over_its_parent_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, "lora: {rank: 4, alpha: 5, rslora: true}\ntrain: {seed: 1}\n", "parent.yaml")
    file = write(tmp_path, "extends: parent.yaml\nlora: {rank: 6}\ntrain: {seed: 2}\n" + SMALL)
    recipe = load_recipe(file, ["train.seed=3"])
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.rslora, recipe.train.seed) == (6, 5, True, 3)
    assert recipe.train.epochs == 1.0


def test_a_list_replaces_the_list_of_the_parent(tmp_path: Path) -> None:
    write(tmp_path, "lora: {targets: [attention, experts, router]}\n", "parent.yaml")
    file = write(tmp_path, "extends: parent.yaml\nlora: {targets: [attention]}\n" + SMALL)
    assert load_recipe(file).lora.targets == ["attention"]


def test_the_value_of_an_override_is_yaml(tmp_path: Path) -> None:
    text = SMALL + "eval: {tasks: [{name: a, path: held_out}]}\n"
    file = write(tmp_path, text)
    assert load_recipe(file, ["eval.tasks=[]"]).eval.tasks == []
    assert load_recipe(file, ["eval.tasks.0.limit=7"]).eval.tasks[0].limit == 7
    assert load_recipe(file, ["data.train=[{path: a.jsonl, limit: 3}]"]).data.train[0].limit == 3
    assert load_recipe(file, ["train.max_steps=null"]).train.max_steps is None
    assert load_recipe(file, ["lora.alpha=8", "lora.alpha=9"]).lora.alpha == 9


def test_a_path_alone_stands_for_a_source(tmp_path: Path) -> None:
    file = write(tmp_path, SMALL)
    for value in ("b.jsonl", "[b.jsonl]", "{path: b.jsonl}", "[{path: b.jsonl}]"):
        recipe = load_recipe(file, [f"data.train={value}", f"data.held_out={value}"])
        assert recipe.data.train == recipe.data.held_out == [Source(path=str(Path("b.jsonl").resolve()))]


def test_paths_are_looked_for_beside_the_file_that_names_them_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    for rows in (
        "recipes/beside.jsonl",
        "here/only-here.jsonl",
        "here/beside.jsonl",
        "parents/inherited.jsonl",
    ):
        write(tmp_path, "", rows)
    write(tmp_path, "data: {held_out: inherited.jsonl}\n", "parents/parent.yaml")
    file = write(
        tmp_path,
        "extends: ../parents/parent.yaml\nname: x\nmodel: {base: nano}\n"
        "data: {train: [{path: beside.jsonl}, {path: only-here.jsonl}, {path: be*.jsonl}]}\n",
        "recipes/recipe.yaml",
    )
    monkeypatch.chdir(here)
    recipe = load_recipe(file)
    recipes = tmp_path / "recipes"
    assert [source.path for source in recipe.data.train] == [
        str(recipes / "beside.jsonl"),
        str(here / "only-here.jsonl"),
        str(recipes / "be*.jsonl"),
    ]
    assert recipe.data.held_out == [Source(path=str(tmp_path / "parents" / "inherited.jsonl"))]
    overridden = load_recipe(file, ["data.train=beside.jsonl"])
    assert overridden.data.train[0].path == str(here / "beside.jsonl")


def test_a_base_is_a_folder_if_there_is_one_and_else_a_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    file = write(tmp_path, SMALL.replace("nano", "checkpoint"))
    assert load_recipe(file).model.base == str(tmp_path / "checkpoint")
    assert load_recipe(file, ["model.base=openai/gpt-oss-20b"]).model.base == "openai/gpt-oss-20b"
    assert load_recipe(file, ["model.base=./missing"]).model.base == str(Path("missing").resolve())


def test_a_recipe_knows_where_each_key_was_written(tmp_path: Path) -> None:
    file = write(tmp_path, SMALL + "train:\n  seed: 4\n")
    recipe = load_recipe(file, ["lora.rank=3"])
    assert recipe.source == file
    assert recipe.at("train", "seed") == f"{file}:5"
    assert recipe.at("train", "epochs") == f"{file}:4"
    assert recipe.at("data", "train", 0, "path") == f"{file}:3"
    assert recipe.at("lora", "rank") == "override lora.rank=3"


def test_the_default_pass_holds_the_longest_example(tmp_path: Path) -> None:
    file = write(tmp_path, SMALL)
    assert load_recipe(file).tokens_per_pass == 8192
    assert load_recipe(file, ["train.tokens_per_step=512", "data.max_tokens=600"]).tokens_per_pass == 600
    assert load_recipe(file, ["train.tokens_per_pass=5000"]).tokens_per_pass == 5000


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    with pytest.raises(ValidationError):
        recipe.train.seed = 5  # type: ignore[misc]


texts = st.text(min_size=1, max_size=20)
recipes = st.builds(
    lambda rank, alpha, rate, share, system, columns, date, wandb: Recipe.model_validate(
        {
            "name": "any",
            "model": {"base": "nano"},
            "lora": {"rank": rank, "alpha": alpha},
            "data": {
                "train": [{"path": "/rows.jsonl", "system": system, "columns": columns}],
                "held_out": share,
                "current_date": date,
            },
            "train": {"learning_rate": rate},
            "tracking": {"wandb": wandb},
        }
    ),
    rank=st.integers(1, 10**6),
    alpha=st.floats(min_value=1e-30, max_value=1e30),
    rate=st.floats(min_value=1e-12, max_value=1e3),
    share=st.one_of(st.floats(0, 0.99), st.just([{"path": "/held.jsonl"}])),
    system=st.one_of(
        st.none(), texts, st.sampled_from(["off", "null", "1e3", "2025-01-01", "a: b", "# no", " x\n"])
    ),
    columns=st.dictionaries(st.sampled_from(["question", "answer", "on", "12"]), texts, max_size=2),
    date=st.sampled_from([None, "2025-08-05"]),
    wandb=st.sampled_from(["off", "online"]),
)


@given(recipes)
def test_a_dumped_recipe_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    file = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(file) == recipe
