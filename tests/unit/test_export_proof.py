"""What is said of an export's proof, by the command and after training."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.errors import FinetuneError
from finetune.export import export, verify
from finetune.export.proof import in_words
from finetune.pipeline import after_training
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from tests.export_kit import write_adapter, write_base, write_talk

SMALL: dict[str, Any] = {"layers": 1, "hidden": 32, "intermediate": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", base)


def test_every_format_says_what_was_checked(base: Path, adapter: Path, tmp_path: Path) -> None:
    said = {to: in_words(export(adapter, to, tmp_path / to)) for to in ("adapter", "bf16", "mxfp4", "gguf")}
    assert said["adapter"] == "read back, it is what was trained, bit for bit"
    assert said["bf16"].endswith("values read back are right")
    assert said["mxfp4"] == "merged into MXFP4 by rounding; what that costs was not measured"
    assert said["gguf"].startswith(said["mxfp4"]) and said["gguf"].endswith("values read back are right")
    assert in_words(export(base, "openai", tmp_path / "openai")).startswith("all ")


def test_a_fitted_merge_says_what_it_keeps(adapter: Path, tmp_path: Path) -> None:
    talk = write_talk(tmp_path / "talk.jsonl", rows=16)
    manifest = export(adapter, "openai", tmp_path / "out", calibrate=talk, kept_at_least=0)
    kept = manifest["proof"]["merged"]["kept"]
    assert f"{kept['change_kept']:.1%} of the adapter's change on {kept['tokens']} held" in in_words(manifest)


@pytest.fixture
def run(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.export.prompts.COUNT", 2)
    data = {"train": [{"path": str(write_talk(tmp_path / "rows.jsonl", rows=16))}], "held_out": 0.25}
    words = {"name": "tiny", "model": {"base": str(base)}, "data": data, "export": {"formats": ["adapter"]}}
    run = RunDir.create(Recipe.model_validate(words))
    run.update(base={"where": str(base)})
    shutil.copytree(adapter, run.adapter)
    run.metrics.write_text(json.dumps({"step": 0, "eval_loss": 1.0}) + "\n")
    return run


def test_after_training_a_small_model_s_exports_are_judged_at_once(run: RunDir) -> None:
    out = io.StringIO()
    after_training(run, Console(file=out, width=1000))
    line = next(line for line in out.getvalue().splitlines() if line.startswith("export (adapter): "))
    assert "bit for bit; transformers loads it, its logits" in line
    manifest = json.loads((run.path / "export" / "adapter" / "finetune_export.json").read_text())
    assert manifest["proof"]["verified"]["passed"]


def test_an_export_that_its_judge_does_not_recognise_ends_the_run_with_a_sentence(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.export.verdict.FLOAT32_LIMIT", 0.0)
    with pytest.raises(FinetuneError, match="transformers does not find the tuned model in this export"):
        after_training(run, Console(file=io.StringIO()))
    assert run.info()["status"] == "trained"


def test_larger_models_are_left_to_the_command(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.pipeline.VERIFIED_UP_TO", 1000)
    monkeypatch.setattr(verify, "verify", lambda *_, **__: pytest.fail("it was judged"))
    after_training(run, Console(file=io.StringIO()))
    assert run.info()["status"] == "done"
