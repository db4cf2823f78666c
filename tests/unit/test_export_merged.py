"""One command from an adapter to a layout that holds a whole model: merged on the way, and it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from finetune.errors import FinetuneError
from finetune.export import export
from tests.checkpoints import write_random_checkpoint
from tests.export_kit import ODD, write_adapter, write_base, write_talk

# Fitting takes a time that grows with layers and widths, and none of this depends on those.
SMALL: dict[str, Any] = {"layers": 1, "hidden": 32, "intermediate": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", base)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk") / "talk.jsonl", rows=16)


def test_gguf_and_openai_of_an_adapter_hold_what_its_mxfp4_export_holds(
    base: Path, adapter: Path, talk: Path, tmp_path: Path
) -> None:
    fit: dict[str, Any] = {"calibrate": talk, "kept_at_least": 0}
    merged = export(adapter, "mxfp4", tmp_path / "merged", base=str(base), **fit)
    for to in ("gguf", "openai"):
        export(tmp_path / "merged", to, tmp_path / f"two steps {to}")
        manifest = export(adapter, to, tmp_path / f"one step {to}", base=str(base), **fit)
        assert manifest["source"] == merged["source"]
        assert manifest["proof"]["merged"] == {"into": "mxfp4", **merged["proof"]}
        assert not (tmp_path / f"one step {to}" / "merged").exists()
    original = "original/model.safetensors"
    assert (tmp_path / "one step openai" / original).read_bytes() == (
        tmp_path / "two steps openai" / original
    ).read_bytes()
    readers = [gguf.GGUFReader(tmp_path / f"{steps} gguf/model.gguf") for steps in ("one step", "two steps")]
    for one, two in zip(*(reader.tensors for reader in readers), strict=True):
        assert one.name == two.name and (one.data == two.data).all()


def test_the_card_says_what_merging_cost(base: Path, adapter: Path, talk: Path, tmp_path: Path) -> None:
    proof = export(adapter, "gguf", tmp_path / "fitted", calibrate=talk, kept_at_least=0)["proof"]
    card = (tmp_path / "fitted" / "README.md").read_text()
    assert f"{proof['merged']['kept']['change_kept']:.1%} of the adapter's change" in card
    export(adapter, "openai", tmp_path / "rounded")
    assert "has not been measured" in (tmp_path / "rounded" / "README.md").read_text()


def test_an_adapter_of_a_bf16_base_is_merged_in_bf16(talk: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", layers=1, experts_as="bf16")
    adapter = write_adapter(tmp_path / "adapter", base)
    manifest = export(adapter, "gguf", tmp_path / "out")
    assert manifest["proof"]["merged"]["into"] == "bf16"
    with pytest.raises(FinetuneError, match="no rounding to fit"):
        export(adapter, "gguf", tmp_path / "fitted", calibrate=talk)
    with pytest.raises(FinetuneError, match="this checkpoint has bf16 ones"):
        export(adapter, "openai", tmp_path / "original")


def test_a_merge_that_keeps_too_little_leaves_nothing(
    base: Path, adapter: Path, talk: Path, tmp_path: Path
) -> None:
    for to in ("gguf", "openai"):
        with pytest.raises(FinetuneError, match="serve the adapter instead"):
            export(adapter, to, tmp_path / "out", calibrate=talk, kept_at_least=1.01)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused_before_anything_is_merged(
    adapter: Path, tmp_path: Path
) -> None:
    other = write_random_checkpoint(tmp_path / "other", tokenizer="bytes", seed=9, **{**ODD, **SMALL})
    with pytest.raises(FinetuneError, match="another base"):
        export(adapter, "gguf", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()
