"""`finetune check`: what it finds, what it refuses, and that it loads no weights to do so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.check import check
from finetune.cli import app
from finetune.errors import FinetuneError
from finetune.recipe import load_recipe
from tests.checkpoints import write_random_checkpoint

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
BAD = '{"messages": [{"role": "waiter", "content": "Hi"}]}\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "base", tokenizer="bytes")
    (tmp_path / "rows.jsonl").write_text(GOOD * 3)
    file = tmp_path / "recipe.yaml"
    file.write_text("name: small\nmodel: {base: base}\ndata: {train: [{path: rows.jsonl}]}\n")
    return file


def test_base_and_rows_are_found_and_sized(recipe: Path) -> None:
    report = check(load_recipe(recipe))
    (rows,) = report.data
    assert (rows.key, rows.rows, rows.more, rows.bad) == ("data.train.0", 3, False, 0)
    assert rows.bytes == len(GOOD) * 3
    assert (report.base.kind, report.base.layers, report.base.experts) == ("mxfp4", 2, 4)
    assert report.base.bytes is not None and 0 < report.base.bytes < 10**6
    assert report.problem is None


def test_held_out_files_and_tasks_are_looked_at_too(recipe: Path) -> None:
    rows = recipe.parent / "rows.jsonl"
    changes = [
        f"data.held_out={rows}",
        f"eval.tasks=[{{name: a, path: {rows}}}, {{name: b, path: held_out}}]",
    ]
    keys = [found.key for found in check(load_recipe(recipe, changes)).data]
    assert keys == ["data.train.0", "data.held_out.0", "eval.tasks.0"]


def test_the_first_bad_row_is_named_and_ends_the_check(recipe: Path) -> None:
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(GOOD + BAD + BAD)
    result = CliRunner().invoke(app, ["check", str(recipe), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout.splitlines()[0])
    assert found["data"][0]["bad"] == 2
    assert f"{rows}:2: " in found["problem"] and "waiter" in found["problem"]
    assert found["problem"] in result.stderr


def test_bad_rows_that_may_be_skipped_are_only_counted(recipe: Path) -> None:
    (recipe.parent / "rows.jsonl").write_text(GOOD + BAD)
    result = CliRunner().invoke(app, ["check", str(recipe), "data.bad_rows=skip"])
    assert result.exit_code == 0
    assert "2 rows" in result.output and "1 bad" in result.output


def test_the_resolved_recipe_is_shown_with_every_default(recipe: Path) -> None:
    output = CliRunner().invoke(app, ["check", str(recipe), "lora.rank=3"]).output
    assert "rank: 3" in output and "learning_rate: 0.0002" in output and "formats:" in output


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.base=./nowhere", "no hub id"),
        ("model.base=/nowhere/at/all", "no hub id"),
        ("data.train=missing.jsonl", "there is no file"),
    ],
)
def test_what_is_not_there_is_named_with_the_key_that_asks_for_it(
    recipe: Path, override: str, sentence: str
) -> None:
    with pytest.raises(FinetuneError, match=sentence) as caught:
        check(load_recipe(recipe, [override]))
    assert str(caught.value).startswith(f"override {override}: {override.split('=')[0]}")


def test_a_base_on_the_hub_is_not_fetched(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_recipe(recipe, ["model.base=someone/some-model"])
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    base = check(wanted).base
    assert (base.where, base.path) == ("someone/some-model", None)
    # Half of it is here, as after a download that was cut short: the run fetches the rest.
    config = tmp_path / "half" / "config.json"
    config.parent.mkdir()
    config.write_text((tmp_path / "base" / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(config))
    assert check(wanted).base == base
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FinetuneError, match=r"neither model\.safetensors"):
        check(wanted)


def test_a_broken_checkpoint_is_refused(recipe: Path) -> None:
    (recipe.parent / "base" / "model.safetensors").unlink()
    with pytest.raises(FinetuneError, match=r"model\.safetensors"):
        check(load_recipe(recipe))


def test_no_weights_are_loaded_nor_anything_that_could(recipe: Path) -> None:
    program = (
        "import sys; from finetune.check import check; from finetune.recipe import load_recipe; "
        f"check(load_recipe({str(recipe)!r})); print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
