"""nano's own recipe: strict, rerunnable, and a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from finetune.errors import FinetuneError
from finetune.model import inspect_checkpoint, load_model
from finetune.nano.pretrain import learning_rate, pretrain
from finetune.nano.spec import PretrainSpec, load_spec

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "nano" / "pretrain.yaml"


def spec(out: Path, **training: object) -> PretrainSpec:
    """The shipped recipe, cut down to seconds."""
    content = YAML(typ="safe", pure=True).load(RECIPE.read_text(encoding="utf-8"))
    content["out"] = str(out)
    content["tokenizer"]["rows"] = 3000
    content["network"] |= {"layers": 2, "experts": 2}
    content["training"] |= {
        "steps": 4,
        "tokens_per_step": 512,
        "save_every_steps": 2,
        "threads": 1,
        **training,
    }
    content["measure"]["questions"] = 1
    return PretrainSpec.model_validate(content)


def test_the_shipped_recipe_loads() -> None:
    assert load_spec(RECIPE).network.layers == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seeds: 1", "seeds"),
        ("families: {chess: 1.0}", "chess is not a family"),
        ("seed: high", "seed"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, line: str, said: str) -> None:
    key = line.split(":")[0]
    kept = [old for old in RECIPE.read_text().splitlines() if not old.startswith(f"{key}:")]
    if key == "families":
        start = kept.index(next(old for old in kept if old.startswith("  add:")))
        kept = [old for i, old in enumerate(kept) if not (i >= start and i < kept.index("training:"))]
    (tmp_path / "wrong.yaml").write_text("\n".join([line, *kept]))
    with pytest.raises(FinetuneError, match=said):
        load_spec(tmp_path / "wrong.yaml")


def test_the_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    training = load_spec(RECIPE).training
    rates = [learning_rate(training, step) for step in range(training.steps)]
    assert rates[0] < rates[training.warmup_steps] == training.learning_rate == max(rates)
    assert 0 < rates[-1] < 0.01 * training.learning_rate


def test_a_short_run_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    pretrain(spec(tmp_path), RECIPE.parent)
    inspect_checkpoint(tmp_path)
    _, tokenizer = load_model(tmp_path, dtype=torch.float32)
    assert len(tokenizer) == 1024
    figures = json.loads((tmp_path / "measured.json").read_text())
    assert set(figures["add"]) == {"low", "medium", "high"}


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = spec(tmp_path / "whole")
    pretrain(whole, RECIPE.parent)
    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    half = parts.model_copy(update={"training": parts.training.model_copy(update={"steps": 2})})
    assert [learning_rate(s.training, 1) for s in (half, whole)] == [whole.training.learning_rate / 25] * 2
    pretrain(half, RECIPE.parent)
    pretrain(parts, RECIPE.parent)
    for shard in (tmp_path / "whole").glob("model-*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "parts" / shard.name).read_bytes()
