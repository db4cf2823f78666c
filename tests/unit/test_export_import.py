from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from finetune.errors import FinetuneError
from finetune.export import export
from finetune.export.importing import import_model
from finetune.model import fingerprint, inspect_checkpoint
from tests.export_kit import write_adapter, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize("to", ["gguf", "openai"])
def test_what_was_exported_comes_back_with_the_same_bytes_and_configuration(
    base: Path, tmp_path: Path, to: str
) -> None:
    export(base, to, tmp_path / "there")
    manifest = import_model(tmp_path / "there", tmp_path / "back")
    assert manifest["kind"] == "mxfp4"
    assert fingerprint(tmp_path / "back") == fingerprint(base)
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "back"))
    assert {key: after[key] for key in before if key != "quantization_config"} == {
        key: value for key, value in before.items() if key != "quantization_config"
    }
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_merged_experts_stay_bf16_by_way_of_a_gguf(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    export(adapter, "bf16", tmp_path / "merged")
    export(tmp_path / "merged", "gguf", tmp_path / "there")
    for source in ("merged", "there"):
        out = tmp_path / f"from-{source}"
        assert import_model(tmp_path / source, out)["kind"] == "bf16"
        assert fingerprint(out) == fingerprint(tmp_path / "merged")


def test_a_configuration_of_transformers_5_is_imported_in_the_released_words(
    base: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    rope = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (source / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    import_model(source, tmp_path / "out")
    words = inspect_checkpoint(tmp_path / "out").config
    assert words["rope_theta"] == 150000 and words["rope_scaling"]["truncate"] is False


def test_another_architecture_an_adapter_and_no_gguf_are_named(base: Path, tmp_path: Path) -> None:
    llama = tmp_path / "llama.gguf"
    writer = gguf.GGUFWriter(llama, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FinetuneError, match="architecture 'llama', not gpt-oss"):
        import_model(llama, tmp_path / "out")
    adapter = write_adapter(tmp_path / "adapter", base)
    export(adapter, "gguf-lora", tmp_path / "lora")
    with pytest.raises(FinetuneError, match="an adapter, not a model"):
        import_model(tmp_path / "lora", tmp_path / "out")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(FinetuneError, match="no GGUF, or cut off"):
        import_model(tmp_path / "broken.gguf", tmp_path / "out")
    with pytest.raises(FinetuneError, match="it is not there"):
        import_model(tmp_path / "missing.gguf", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FinetuneError, match="nothing to import"):
        import_model(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_tokenizer_asks_for_one(base: Path, tmp_path: Path) -> None:
    export(base, "gguf", tmp_path / "there")
    (tmp_path / "there" / "tokenizer.json").unlink()
    with pytest.raises(FinetuneError, match="--tokenizer"):
        import_model(tmp_path / "there", tmp_path / "out")
    import_model(tmp_path / "there", tmp_path / "out", tokenizer=base)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
