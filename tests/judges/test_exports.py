"""Judges of every export: transformers with PEFT, OpenAI's code and llama.cpp, on odd shapes and on nano."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import FinetuneError
from finetune.export import export
from finetune.export.judges import JUDGE_OF, LLAMA, OPENAI
from finetune.export.verdict import Verdict
from finetune.export.verify import verify
from finetune.manifest import MANIFEST, sha256
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from tests.checkpoints import NANO
from tests.export_kit import SHAPES, write_adapter, write_base, write_talk

PACKAGES = {OPENAI: "gpt_oss", LLAMA: "llama_cpp"}


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "odd", **SHAPES[request.param])


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", base)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk") / "talk.jsonl", rows=16)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.export.prompts.COUNT", 2)
    monkeypatch.setattr("finetune.export.verify.NEW_TOKENS", 4)


def ask_judge(to: str) -> None:
    package = PACKAGES.get(JUDGE_OF[to])
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the judge of {to} is the package {package}, which is not installed")


def judged(source: Path, to: str, out: Path, data: Path | None = None, **options: Any) -> Verdict:
    ask_judge(to)
    export(source, to, out, **options)
    verdict = verify(out, against=str(source), data=data)
    assert json.loads((out / MANIFEST).read_text())["proof"]["verified"] == verdict.to_dict()
    return verdict


@pytest.mark.parametrize("to", ["adapter", "gguf-lora", "sglang-lora"])
def test_another_program_with_the_adapter_computes_what_the_tuned_model_computes(
    adapter: Path, tmp_path: Path, to: str
) -> None:
    verdict = judged(adapter, to, tmp_path / "out")
    assert verdict.passed and verdict.max_difference < 2e-5 and verdict.greedy_equal == verdict.greedy
    assert verdict.effect is not None and verdict.effect > 100 * verdict.mean_difference


@pytest.mark.parametrize("to", ["bf16", "gguf", "openai"])
def test_another_program_computes_what_the_base_computes(base: Path, tmp_path: Path, to: str) -> None:
    verdict = judged(base, to, tmp_path / "out")
    assert verdict.passed and verdict.max_difference < 2e-5 and verdict.greedy_equal == verdict.greedy


def test_llama_cpp_computes_nearly_the_same_with_the_file_as_it_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = judged(base, "gguf", tmp_path / "out")
    assert verdict.passed and verdict.as_it_is is not None and verdict.as_it_is_allowed is not None
    assert 0 < verdict.as_it_is < verdict.as_it_is_allowed
    monkeypatch.setattr("finetune.export.verdict.AS_IT_IS_SHARE", 1e-6)
    assert not verify(tmp_path / "out", against=str(base)).passed


def test_a_merge_costs_no_more_than_bf16_costs_the_untuned_base(adapter: Path, tmp_path: Path) -> None:
    verdict = judged(adapter, "bf16", tmp_path / "out")
    assert verdict.passed and verdict.effect is not None
    assert verdict.typical_difference < 0.1 * verdict.effect


@pytest.mark.parametrize("to", ["mxfp4", "gguf", "openai"])
def test_a_merge_into_mxfp4_keeps_by_its_judge_what_it_states(
    adapter: Path, talk: Path, tmp_path: Path, to: str
) -> None:
    verdict = judged(adapter, to, tmp_path / "out", talk, calibrate=talk, kept_at_least=0)
    assert verdict.passed and verdict.kept and verdict.reading is not None and verdict.reading < 2e-5
    assert verdict.kept.stated_change and verdict.kept.change == pytest.approx(
        verdict.kept.stated_change, abs=0.02 if to == "gguf" else 1e-4
    )
    # Stated too well, the same files do not pass.
    file = tmp_path / "out" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["proof"].get("merged", manifest["proof"])["kept"]["change_kept"] += 0.05
    file.write_text(json.dumps(manifest))
    assert not verify(tmp_path / "out", against=str(adapter), data=talk).passed


def test_a_merge_that_was_not_measured_is_judged_by_what_is_read(adapter: Path, tmp_path: Path) -> None:
    verdict = judged(adapter, "mxfp4", tmp_path / "out")
    assert verdict.passed and verdict.kept and verdict.kept.stated_change is None
    assert verdict.kept.change is not None and verdict.kept.change < 1


@pytest.mark.parametrize("tuned", [False, True])
def test_dense_tensors_in_q8_0_are_read_by_llama_cpp_as_by_us(
    base: Path, adapter: Path, tmp_path: Path, tuned: bool
) -> None:
    verdict = judged(adapter if tuned else base, "gguf", tmp_path / "out", dense="q8_0")
    assert verdict.passed and verdict.reading is not None and verdict.reading < 2e-5
    assert verdict.typical_difference > 1e-4


def test_a_merged_directory_goes_on_to_gguf(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(adapter, "bf16", tmp_path / "merged")
    verdict = judged(tmp_path / "merged", "gguf", tmp_path / "out")
    assert verdict.passed and verdict.max_difference < 2e-5
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["made_from"]["format"] == "bf16"


def test_llama_cpp_takes_a_lora_of_the_router(base: Path, tmp_path: Path) -> None:
    router = write_adapter(tmp_path / "router", base, targets=["experts", "router"], rslora=False)
    assert judged(router, "gguf-lora", tmp_path / "out").passed


def test_an_export_of_another_adapter_does_not_pass(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", base, size=0.06)
    export(other, "sglang-lora", tmp_path / "out")
    with pytest.raises(FinetuneError, match="another adapter"):
        verify(tmp_path / "out", against=str(adapter))
    with pytest.raises(FinetuneError, match="has an adapter in it"):
        verify(tmp_path / "out", against=str(base))
    # The record forged to name the first adapter: the logits tell.
    file = tmp_path / "out" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["source"]["adapter_sha256"] = sha256(adapter / "adapter_model.safetensors")
    file.write_text(json.dumps(manifest))
    verdict = verify(tmp_path / "out", against=str(adapter))
    assert not verdict.passed and verdict.max_difference > 0.01


def test_a_changed_file_and_a_folder_that_is_no_export_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="not an export"):
        verify(base)
    export(base, "openai", tmp_path / "out")
    weights = tmp_path / "out" / "original" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FinetuneError, match=r"model\.safetensors: this file is not as it was exported"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("to", ["adapter", "bf16", "gguf-lora", "sglang-lora"])
def test_tuned_nano_passes_every_judge(tmp_path: Path, to: str) -> None:
    if not (NANO / "config.json").is_file():
        pytest.skip("the bundled model is not there")
    adapter = write_adapter(tmp_path / "tuned", NANO, size=0.01, rank=8)
    assert judged(adapter, to, tmp_path / "out").passed


def test_a_runs_export_finds_its_run_and_asks_about_its_held_out_rows(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
        for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "held_out": 0.5}
    recipe = Recipe.model_validate({"name": "tiny", "model": {"base": str(base)}, "data": data})
    monkeypatch.chdir(tmp_path)
    run = RunDir.create(recipe)
    run.update(base={"where": str(base)})
    shutil.copytree(adapter, run.adapter)
    export(run.path, "adapter", tmp_path / "out")
    verdict = verify(tmp_path / "out")
    assert verdict.passed and verdict.prompts == "2 held-out conversations"
    assert verify(tmp_path / "out", data=tmp_path / "rows.jsonl").prompts == "2 rows of rows.jsonl"
    shutil.rmtree(run.path)
    with pytest.raises(FinetuneError, match="--against"):
        verify(tmp_path / "out")
