"""What is said about a wrong recipe: one sentence a mistake, with the place that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.recipe import load_recipe, require_files

SMALL = "name: small\nmodel: {base: nano}\ndata: {train: [{path: rows.jsonl}]}\n"


def said(folder: Path, text: str, *overrides: str) -> str:
    """The whole error of a recipe, its path shortened to `recipe.yaml`."""
    file = folder / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(FinetuneError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_an_unknown_key_is_named_with_the_one_that_was_meant(tmp_path: Path) -> None:
    expected = "recipe.yaml:5: train.learnin_rate: there is no such setting; did you mean 'learning_rate'?"
    assert said(tmp_path, SMALL + "train:\n  learnin_rate: 1e-4\n") == expected


def test_an_unknown_key_that_resembles_none_is_told_the_known_ones(tmp_path: Path) -> None:
    expected = "recipe.yaml:4: model.colour: there is no such setting; known here are base, dense, experts_on"
    assert said(tmp_path, SMALL.replace("base: nano", "base: nano,\n\n colour: red")) == expected


def test_unknown_keys_are_found_inside_lists(tmp_path: Path) -> None:
    text = SMALL + "eval:\n  tasks:\n    - name: a\n      path: held_out\n      limt: 4\n"
    assert said(tmp_path, text) == (
        "recipe.yaml:8: eval.tasks.0.limt: there is no such setting; did you mean 'limit'?"
    )


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("lora.rank", "abc", "must be a whole number, not the text 'abc'"),
        ("lora.rank", "1.5", "must be a whole number, not the number 1.5"),
        ("lora.rank", "true", "must be a whole number, not true"),
        ("lora.rank", "0", "must be at least 1, not the number 0"),
        ("lora.rank", "null", "must be a whole number, not null"),
        ("lora.alpha", "[1]", "must be a number, not a list"),
        ("train.learning_rate", "fast", "must be a number, not the text 'fast'"),
        ("train.learning_rate", ".inf", "must be a finite number, not the number inf"),
        ("train.learning_rate", "-1", "must be greater than 0.0, not the number -1"),
        ("train.warmup", "3", "must be below 1.0, not the number 3"),
        ("data.held_out", "1.5", "must be below 1.0, not the number 1.5"),
        ("data.analysis", "on", "must be true or false, not the text 'on'"),
        ("data.max_tokens", "{a: 1}", "must be a whole number, not a mapping"),
        ("data.train", "3", "must be a list, not the number 3"),
        ("data.train", "[]", "must not be empty"),
        ("data.current_date", "yesterday", "must be a date written as 2025-08-05, not the text 'yesterday'"),
        ("model", "nano", "must be a section with keys of its own, not the text 'nano'"),
        ("model.base", "3", "must be text, not the number 3"),
        (
            "lora.targets.0",
            "atention",
            "must be attention, experts or router, not the text 'atention'; did you mean 'attention'?",
        ),
        ("method", "dpo", "dpo is not there yet; sft is the one method so far"),
        ("method", "magic", "must be sft, not the text 'magic'"),
    ],
)
def test_a_wrong_value_is_shown_beside_what_belongs_there(
    tmp_path: Path, key: str, value: str, sentence: str
) -> None:
    text = SMALL + "lora: {targets: [experts]}\n"
    assert said(tmp_path, text, f"{key}={value}") == f"override {key}={value}: {key}: {sentence}"


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    text = SMALL.replace("base: nano", "dense: bf16")
    assert said(tmp_path, text) == ("recipe.yaml:2: model.base: this setting is missing, and has no default")


def test_every_mistake_is_said_on_a_line_of_its_own(tmp_path: Path) -> None:
    lines = said(tmp_path, SMALL + "lora:\n  rank: x\ntrain:\n  sede: 3\n").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:5", "lora.rank"],
        ["recipe.yaml:7", "train.sede"],
    ]


def test_an_inherited_mistake_points_into_the_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("# parent\nlora:\n  rank: big\n")
    error = said(tmp_path, "extends: parent.yaml\n" + SMALL)
    assert error == "parent.yaml:3: lora.rank: must be a whole number, not the text 'big'"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.seed", "an override is written dotted.key=value, as in train.max_steps=100"),
        ("=3", "an override is written dotted.key=value, as in train.max_steps=100"),
        ("train..seed=3", "an override is written dotted.key=value, as in train.max_steps=100"),
        ("train.seed=[1", "the value is not valid YAML"),
        ("train.seed.x=1", "train.seed is a single value and has no keys below it"),
        ("data.train.5.limit=1", "data.train has no item 5: its 1 are numbered from 0"),
        ("data.train.5=x", "data.train has no item 5: its 1 are numbered from 0"),
        ("extends=other.yaml", "a parent is named in the recipe file, not by an override"),
    ],
)
def test_a_bad_override_is_quoted(tmp_path: Path, override: str, sentence: str) -> None:
    assert said(tmp_path, SMALL + "train: {seed: 1}\n", override) == f"override {override}: {sentence}"


def test_recipes_that_extend_each_other_are_shown_as_a_circle(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: recipe.yaml\n")
    assert said(tmp_path, "extends: other.yaml\n") == (
        "other.yaml:1: extends: these recipes extend each other in a circle: "
        "recipe.yaml -> other.yaml -> recipe.yaml"
    )


def test_a_parent_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = said(tmp_path, SMALL + "extends: nowhere.yaml\n")
    assert error == "recipe.yaml:4: extends: there is no recipe file nowhere.yaml"
    assert said(tmp_path, SMALL + "extends: [a, b]\n") == "recipe.yaml:4: extends: must name one recipe file"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name: x\nlora: {rank: 3\n", "recipe.yaml:3: this is not valid YAML: "),
        ("name: x\n\tlora: 3\n", "recipe.yaml:2: this is not valid YAML: "),
        ("name: x\nname: y\n", "recipe.yaml:2: found duplicate key "),
        ("name: x\n3: y\n", "recipe.yaml:2: the key 3 must be text; put it in quotes"),
        ("- a\n- b\n", "recipe.yaml:1: a recipe is a mapping of keys to values, as in `name: my-run`"),
        ("", "recipe.yaml:1: a recipe is a mapping of keys to values, as in `name: my-run`"),
    ],
)
def test_what_is_no_recipe_is_said_with_its_line(tmp_path: Path, text: str, error: str) -> None:
    assert said(tmp_path, text).startswith(error)


def test_a_recipe_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=r"nowhere\.yaml: there is no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(FinetuneError, match="this is a folder; name the recipe file in it"):
        load_recipe(tmp_path)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FinetuneError, match=r"recipe\.yaml:1: a recipe is UTF-8 text"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_data_file_that_is_not_there_is_named_with_the_line_that_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL)
    with pytest.raises(FinetuneError) as caught:
        require_files(load_recipe(file))
    missing = Path("rows.jsonl").resolve()
    assert str(caught.value) == f"{file}:3: data.train.0.path: there is no file {missing}"
    (tmp_path / "rows.jsonl").touch()
    require_files(load_recipe(file))


def test_settings_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    assert said(tmp_path, SMALL, "train.tokens_per_pass=100") == (
        "override train.tokens_per_pass=100: train.tokens_per_pass: "
        "a pass of 100 tokens cannot hold an example of data.max_tokens (4096)"
    )
    text = SMALL.replace("]}", "], held_out: 0}") + "eval:\n  tasks:\n  - {name: a, path: held_out}\n"
    assert said(tmp_path, text) == (
        "recipe.yaml:6: eval.tasks.0.path: there are no held-out rows: data.held_out is 0"
    )
    twice = SMALL + "eval: {tasks: [{name: a, path: x}, {name: a, path: y}]}\n"
    assert said(tmp_path, twice).endswith("eval.tasks: 2 tasks are called 'a'; each needs a name of its own")
    for source in ("{path: a, hub: b}", "{split: test}"):
        error = said(tmp_path, SMALL, f"data.train=[{source}]")
        assert error.endswith("a source needs exactly one of path (a file) and hub (a data set's id)")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: 2025-13-45\n", "this is not valid YAML: month must be in 1..12"),
        ("name: !!bool maybe\n", "this is not valid YAML"),
        ("- " * 3000 + "\n", "this is nested too deep for a recipe"),
        ("--- a\n--- b\n", "expected a single document in the stream, but found another document"),
        ("extends: ~no-such-user/recipe.yaml\n", "extends: there is no recipe file"),
        (f"extends: {'a' * 5000}\n", "extends: there is no recipe file"),
        (SMALL.replace("rows.jsonl", "~no-such-user/a"), "data.train.0.path: '~no-such-user/a' is no path"),
        (SMALL.replace("rows.jsonl", '"\\ud800"'), r"data.train.0.path: '\ud800' is no path"),
    ],
)
def test_what_yaml_or_the_file_system_chokes_on_is_a_sentence(
    tmp_path: Path, text: str, sentence: str
) -> None:
    assert sentence in said(tmp_path, text)


def test_what_is_wrong_inside_an_override_is_said_of_it(tmp_path: Path) -> None:
    said_of_it = "override lora={[a]: 3}: the key ('a',) must be text"
    assert said(tmp_path, SMALL, "lora={[a]: 3}").startswith(said_of_it)
