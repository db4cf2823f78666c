from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import FinetuneError
from finetune.export import export, tensors
from finetune.export.dialect import generation_config, released_config
from finetune.export.gguf_layout import pack_rows, unpack_rows
from finetune.export.gguf_words import O200K_SIGN
from finetune.model import inspect_checkpoint
from finetune.model.mxfp4 import dequantise_mxfp4
from tests.export_kit import write_adapter, write_base

STOPS = ("<|return|>", "<|endoftext|>", "<|call|>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", base)


def test_mxfp4_rows_of_gguf_decode_to_the_same_values_and_go_back_to_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (6, 3), generator=generator, dtype=torch.uint8)
    rows = pack_rows(blocks, scales)
    decoded = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(decoded), dequantise_mxfp4(blocks, scales, torch.float32))
    again_blocks, again_scales = unpack_rows(rows)
    assert torch.equal(again_blocks, blocks) and torch.equal(again_scales, scales)


def test_a_bf16_export_speaks_the_released_dialect_and_has_no_quantization(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    manifest = export(adapter, "bf16", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_scaling"]["truncate"] is False
    assert config["rope_theta"] == 150000
    assert config["experts_per_token"] == 3
    assert inspect_checkpoint(tmp_path / "out").kind == "bf16"
    assert manifest["proof"]["expert_weights_changed"] == 2 * 3 * 5
    for name in ("tokenizer.json", "LICENSE", "README.md"):
        assert name in manifest["files"]


@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_a_merged_directory_ends_at_all_three_stop_tokens_in_the_released_dialect(
    base: Path, adapter: Path, tmp_path: Path, to: str
) -> None:
    export(adapter, to, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation_config(base)["eos_token_id"] and len(STOPS) == 3
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", base))
    quantised = {"quantization_config": before["quantization_config"]} if to == "mxfp4" else {}
    assert config == {**{k: v for k, v in before.items() if k != "quantization_config"}, **quantised}


def test_every_export_ends_at_all_three_stop_tokens_of_its_tokenizer(base: Path, tmp_path: Path) -> None:
    tokens = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    assert generation_config(base)["eos_token_id"] == [ids[name] for name in STOPS]
    assert generation_config(tmp_path)["eos_token_id"] == [200002, 199999, 200012]


def test_a_configuration_of_transformers_5_is_put_into_the_released_words() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    new = {
        "rope_parameters": {"rope_theta": 150000, **scaling},
        "num_experts_per_tok": 4,
        "dtype": "bfloat16",
    }
    config = released_config(new, packed=True)
    assert (config["rope_theta"], config["rope_scaling"]) == (150000, scaling)
    assert (config["experts_per_token"], config["initial_context_length"]) == (4, 4096)
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert "dtype" not in config and "rope_parameters" not in config


def test_gguf_has_the_types_and_words_that_llama_cpp_expects(base: Path, tmp_path: Path) -> None:
    export(base, "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")} == {"MXFP4"}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "BF16"
    assert kinds["blk.0.attn_sinks.weight"] == kinds["blk.2.ffn_gate_inp.weight"] == "F32"
    assert reader.fields["general.architecture"].contents() == "gpt-oss"
    assert reader.fields["gpt-oss.rope.scaling.factor"].contents() == 32
    assert reader.fields["gpt-oss.expert_used_count"].contents() == 3
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320


def test_dense_tensors_of_a_gguf_can_have_eight_bits_and_the_rest_stays(base: Path, tmp_path: Path) -> None:
    export(base, "gguf", tmp_path / "plain")
    manifest = export(base, "gguf", tmp_path / "small", dense="q8_0")
    assert manifest["proof"]["dense"] == "q8_0"
    plain, small = (gguf.GGUFReader(tmp_path / name / "model.gguf").tensors for name in ("plain", "small"))
    for before, after in zip(plain, small, strict=True):
        assert before.name == after.name
        if before.tensor_type.name == "BF16":
            assert after.tensor_type.name == "Q8_0" and after.n_bytes * 32 == before.n_elements * 34
        else:
            assert (before.data == after.data).all()


def test_the_released_tokenizer_is_known_to_llama_cpp_by_its_own_name(shared: Path) -> None:
    tokenizer = json.loads((shared / "o200k" / "tokenizer.json").read_text(encoding="utf-8"))
    assert O200K_SIGN in json.dumps(tokenizer["pre_tokenizer"]).replace(r"\\", "\\")


def test_openais_layout_holds_the_same_bytes_under_its_own_names(base: Path, tmp_path: Path) -> None:
    manifest = export(base, "openai", tmp_path / "out")
    written = load_file(tmp_path / "out" / "original" / "model.safetensors")
    stored = {}
    for file in base.glob("*.safetensors"):
        stored.update(load_file(file))
    here = "model.layers.2."
    blocks = stored[here + "mlp.experts.gate_up_proj_blocks"]
    assert torch.equal(written["block.2.mlp.mlp1_weight.blocks"], blocks)
    joined = torch.cat([stored[f"{here}self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(written["block.2.attn.qkv.weight"], joined)
    assert manifest["proof"]["bytes_equal_to_the_source"] == sum(t.nbytes for t in stored.values())
    dtypes = json.loads((tmp_path / "out" / "original" / "dtypes.json").read_text())
    assert dtypes["block.0.mlp.mlp2_weight.scales"] == "UE8" and dtypes["norm.scale"] == "BF16"


def test_sglang_gets_a_pair_for_every_expert_and_no_stacked_one(adapter: Path, tmp_path: Path) -> None:
    export(adapter, "sglang-lora", tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    here = "base_model.model.model.layers.2.mlp.experts.4."
    assert written[here + "up_proj.lora_B.weight"].shape == (160, 3)
    assert written[here + "down_proj.lora_A.weight"].shape == (3, 160)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {"gate_proj", "up_proj", "down_proj", "q_proj"} <= set(config["target_modules"])
    assert config["lora_alpha"] == config["r"] == 3 and "target_parameters" not in config


@pytest.mark.parametrize("to", ["bf16", "gguf-lora", "sglang-lora"])
def test_a_disk_that_fills_up_half_way_leaves_nothing_behind(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    plain, written = tensors.as_bytes, [0]

    def full(tensor: torch.Tensor) -> memoryview:
        written[0] += 1
        if written[0] > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(tensor)

    monkeypatch.setattr("finetune.export.tensors.as_bytes", full)
    monkeypatch.setattr("finetune.export.gguf.as_bytes", full)
    with pytest.raises(FinetuneError, match="no space is left"):
        export(adapter, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_was_killed_keeps_the_shards_that_were_whole(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.export.tensors.SHARD_BYTES", 200_000)
    manifest = export(adapter, "bf16", tmp_path / "whole")
    shards = sorted((tmp_path / "whole").glob("model-*.safetensors"))
    assert len(shards) > 3
    # What a kill leaves: the temporary folder with finished shards, and the mark of what it was.
    part = tmp_path / ".out.part"
    part.mkdir()
    for shard in shards[:-2]:
        shutil.copy(shard, part / shard.name)
    facts = {key: manifest[key] for key in ("base", "source")}
    (tmp_path / ".out.mark").write_text(f"bf16 {facts}")
    plain, made = tensors.write_safetensors, []

    def noted(file: Path, planned: Any) -> None:
        made.append(file.name)
        plain(file, planned)

    monkeypatch.setattr("finetune.export.tensors.write_safetensors", noted)
    again = export(adapter, "bf16", tmp_path / "out")
    assert made == [shard.name for shard in shards[-2:]]
    assert again["files"] == manifest["files"]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_what_cannot_be_is_said_in_a_sentence(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for to in ("gguf-lora", "sglang-lora", "adapter"):
        with pytest.raises(FinetuneError, match="no finished adapter"):
            export(base, to, out)
    with pytest.raises(FinetuneError, match="no adapter here whose merging"):
        export(base, "gguf", out, calibrate=tmp_path / "rows.jsonl")
    with pytest.raises(FinetuneError, match="only gguf can have them in q8_0"):
        export(base, "openai", out, dense="q8_0")
    (tmp_path / "there").mkdir()
    for where, to in ((adapter, "bf16"), (base, "gguf")):
        with pytest.raises(FinetuneError, match="exists already"):
            export(where, to, tmp_path / "there")
    merged = tmp_path / "merged"
    export(adapter, "bf16", merged)
    with pytest.raises(FinetuneError, match="MXFP4 experts, and this checkpoint has bf16"):
        export(merged, "openai", out)


def test_what_another_program_could_not_run_is_refused(base: Path, tmp_path: Path) -> None:
    router = write_adapter(tmp_path / "router", base, targets=["experts", "router"])
    with pytest.raises(FinetuneError, match="router, where SGLang has no LoRA"):
        export(router, "sglang-lora", tmp_path / "out")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "swiglu_limit": 5.0}))
    with pytest.raises(FinetuneError, match="swiglu"):
        export(other, "gguf", tmp_path / "out")
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").unlink()
    with pytest.raises(FinetuneError, match=r"no tokenizer\.json"):
        export(other, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_that_bf16_cannot_hold_is_an_error(base: Path, tmp_path: Path) -> None:
    tiny = write_adapter(tmp_path / "tiny", base, size=1e-9)
    with pytest.raises(FinetuneError, match="too small for bf16"):
        export(tiny, "bf16", tmp_path / "out")


def test_an_adapter_file_that_is_cut_off_is_named(adapter: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(adapter, tmp_path / "cut"))
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for to in ("bf16", "gguf-lora"):
        with pytest.raises(FinetuneError, match="cannot be read"):
            export(cut, to, tmp_path / "out")
