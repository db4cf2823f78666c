"""A bad checkpoint is refused before any weight is read, in one sentence that names the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.model import inspect_checkpoint, load_base, load_model
from tests.checkpoints import write_random_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00000-of-00002.safetensors", "model-00002-of-00002.safetensors"
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "base"
    return write_random_checkpoint(path, shards=3, tokenizer="bytes", vocab=266)


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "base"))


def refusal(path: Path) -> str:
    """The one sentence that both inspection and loading end in."""
    with pytest.raises(FinetuneError) as inspected:
        inspect_checkpoint(path)
    with pytest.raises(FinetuneError) as loaded:
        load_base(path, dtype=torch.float32, device="cpu")
    sentence = str(inspected.value)
    assert sentence == str(loaded.value)
    assert "\n" not in sentence and str(path) in sentence
    return sentence


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header and leave the bytes after it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_folder_without_config_json(bad: Path) -> None:
    (bad / "config.json").unlink()
    assert "no config.json in the model directory" in refusal(bad)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable as JSON"),
        ("\xff", "model_type"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"model_type": "llama"}', "model of type 'llama'; finetune trains gpt-oss models"),
        ("{}", "model of type 'None'"),
    ],
    ids=["cut-off", "not-utf8", "a-list", "deep", "llama", "empty"],
)
def test_a_config_json_of_something_else(bad: Path, text: str, words: str) -> None:
    (bad / "config.json").write_text(text, encoding="latin-1")
    sentence = refusal(bad)
    assert "config.json: " in sentence
    assert words in sentence or "not readable as JSON" in sentence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None), ("hidden_size", "64"), ("hidden_size", 64.0), ("hidden_size", True),
        ("num_hidden_layers", 0), ("num_attention_heads", -4), ("num_experts_per_tok", 5),
        ("num_experts_per_tok", None), ("num_key_value_heads", 3), ("head_dim", 15), ("sliding_window", 0),
        ("sliding_window", None), ("sliding_window", "128"), ("layer_types", ["full_attention"]),
        ("layer_types", ["chunked_attention"] * 2), ("layer_types", "full_attention"),
        ("attention_bias", False), ("tie_word_embeddings", True), ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
    ],
)  # fmt: skip
def test_a_value_in_config_json_that_cannot_be(bad: Path, key: str, value: object) -> None:
    edit_json(bad / "config.json", lambda config: config.update({key: value}))
    sentence = refusal(bad)
    assert "config.json: " in sentence and f"'{key}'" in sentence


@pytest.mark.parametrize("key", ["hidden_size", "num_local_experts", "num_experts_per_tok", "vocab_size"])
def test_a_key_missing_from_config_json(bad: Path, key: str) -> None:
    edit_json(bad / "config.json", lambda config: config.pop(key))
    assert f"'{key}' is missing" in refusal(bad)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_sizes_that_are_no_whole_blocks(bad: Path, key: str) -> None:
    edit_json(bad / "config.json", lambda config: config.update({key: 80}))
    assert f"'{key}' is not a multiple of 32" in refusal(bad)


@pytest.mark.parametrize("quantisation", [{"quant_method": "gptq"}, {}, "bitsandbytes", {"bits": 4}])
def test_another_quantisation(bad: Path, quantisation: object) -> None:
    edit_json(bad / "config.json", lambda config: config.update(quantization_config=quantisation))
    if not quantisation:  # as good as absent: the tensors say what they are
        assert inspect_checkpoint(bad).kind == "mxfp4"
        return
    assert "finetune reads mxfp4 or bf16 checkpoints" in refusal(bad)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "unheard-of"}), ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_theta", "fast"), ("rms_norm_eps", "small"), ("swiglu_limit", [7]),
    ],
)  # fmt: skip
def test_a_value_that_transformers_does_not_take(bad: Path, key: str, value: object) -> None:
    edit_json(bad / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(FinetuneError, match=r"config\.json: transformers cannot use this configuration"):
        load_base(bad, dtype=torch.float32, device="cpu")


def test_more_layers_in_config_json_than_there_are(bad: Path) -> None:
    large = 10**12  # and no memory taken for naming them all
    edit_json(bad / "config.json", lambda c: c.update(num_hidden_layers=large, layer_types=None))
    assert "tensor 'model.layers.2.input_layernorm.weight' is missing" in refusal(bad)


def test_a_missing_shard(bad: Path) -> None:
    (bad / LAST).unlink()
    assert f"shard {LAST} is missing (3 are listed in {INDEX})" in refusal(bad)


def test_no_weights_at_all(bad: Path) -> None:
    for file in bad.glob("model*"):
        file.unlink()
    assert "model.safetensors is there" in refusal(bad)


@pytest.mark.parametrize("missing", [1, 5000])
def test_a_shard_that_is_cut_off(bad: Path, missing: int) -> None:
    content = (bad / LAST).read_bytes()
    (bad / LAST).write_bytes(content[:-missing])
    assert f"{LAST}: the file is cut off: {missing:,} bytes are missing" in refusal(bad)


@pytest.mark.parametrize("kept", [0, 4, 8, 100])
def test_a_shard_that_is_cut_off_in_its_header(bad: Path, kept: int) -> None:
    (bad / FIRST).write_bytes((bad / FIRST).read_bytes()[:kept])
    assert f"{FIRST}: not a safetensors file, or cut off in its header" in refusal(bad)


@pytest.mark.parametrize("change", ["names", "page", "html"])
def test_a_shard_that_is_something_else(bad: Path, change: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4792272488\n"
    contents = {"names": pointer, "page": b"<!doctype html>" * 100, "html": b"\xff" * 4096}
    (bad / FIRST).write_bytes(contents[change])
    assert f"{FIRST}: not a safetensors file" in refusal(bad)


def test_a_shard_that_goes_on_after_its_tensors(bad: Path) -> None:
    with (bad / FIRST).open("ab") as file:
        file.write(b"12345")
    assert f"{FIRST}: the file goes on for 5 bytes after its tensors" in refusal(bad)


def test_a_shard_that_is_a_folder(bad: Path) -> None:
    (bad / FIRST).unlink()
    (bad / FIRST).mkdir()
    assert f"shard {FIRST} is missing" in refusal(bad)


@pytest.mark.parametrize("header", ["[]", "7", '{"x": 7}', '{"x": {}}', "{", '"x"', "[" * 100_000, "\xff"])
def test_a_header_that_is_not_one(bad: Path, header: str) -> None:
    text = header.encode("latin-1")
    (bad / FIRST).write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    assert f"{FIRST}: its safetensors header is not readable" in refusal(bad)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": 7}, {"dtype": None}, {"shape": [-1, 64]}, {"shape": [2.5]}, {"shape": "ab"}, {"shape": 7},
        {"shape": [True]}, {"data_offsets": [-8, 0]}, {"data_offsets": [0]}, {"data_offsets": [0, 1, 2]},
        {"data_offsets": "ab"}, {"data_offsets": [0.0, 8.0]}, {"data_offsets": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_a_header_that_is_not_one(bad: Path, entry: dict[str, Any]) -> None:
    edit_header(bad / FIRST, lambda header: header["model.embed_tokens.weight"].update(entry))
    assert f"{FIRST}: its safetensors header is not readable" in refusal(bad)


def test_a_shape_that_does_not_match_its_bytes(bad: Path) -> None:
    edit_header(bad / FIRST, lambda header: header["lm_head.weight"].update(shape=[266, 65]))
    assert f"{FIRST}: tensor 'lm_head.weight' has 34,048 bytes where its shape needs 34,580" in refusal(bad)


@pytest.mark.parametrize("moved", [-64, 64, 1 << 60])
def test_tensors_that_overlap_or_leave_a_gap(bad: Path, moved: int) -> None:
    def move(header: dict[str, Any]) -> None:
        last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
        last["data_offsets"] = [place + moved for place in last["data_offsets"]]

    edit_header(bad / FIRST, move)
    assert "overlaps another or leaves a gap" in refusal(bad)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "", "x\0y", ".."]
)
def test_an_index_that_leads_out_of_the_folder(bad: Path, name: str) -> None:
    shutil.copy(bad / FIRST, bad.parent / "elsewhere.safetensors")
    edit_json(bad / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    sentence = refusal(bad)
    assert "is not a file name in the model directory" in sentence or "is missing (" in sentence


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"x": 7}}'])
def test_an_index_that_is_not_one(bad: Path, text: str) -> None:
    (bad / INDEX).write_text(text)
    assert f"{INDEX}: not a readable index of shards" in refusal(bad)


def test_a_tensor_that_two_shards_have(bad: Path) -> None:
    embeddings = load_file(bad / FIRST)["model.embed_tokens.weight"].clone()
    edit_tensors(bad / LAST, lambda tensors: tensors.update({"model.embed_tokens.weight": embeddings}))
    assert f"{LAST}: tensor 'model.embed_tokens.weight' is in {FIRST} too" in refusal(bad)


def test_a_tensor_that_is_missing(bad: Path) -> None:
    edit_tensors(bad / FIRST, lambda tensors: tensors.pop("model.norm.weight"))
    assert "tensor 'model.norm.weight' is missing from the checkpoint" in refusal(bad)


def test_blocks_without_their_scales(tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "base")
    name = BLOCKS.replace("_blocks", "_scales")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"tensor '{name}' is missing" in refusal(base)


def test_a_tensor_that_gpt_oss_has_not(bad: Path) -> None:
    edit_tensors(bad / LAST, lambda tensors: tensors.update({"model.layers.0.mlp.bias": torch.zeros(2)}))
    assert f"{LAST}: the checkpoint has a tensor that gpt-oss has not: 'model.layers.0.mlp.bias'" in refusal(
        bad
    )


def test_a_tensor_of_the_wrong_shape(bad: Path) -> None:
    shorter = torch.zeros(265, 64, dtype=torch.bfloat16)
    edit_tensors(bad / FIRST, lambda tensors: tensors.update({"lm_head.weight": shorter}))
    words = "tensor 'lm_head.weight' has the shape [265, 64] where config.json asks for [266, 64]"
    assert f"{FIRST}: {words}" in refusal(bad)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lm_head.weight", torch.int8), ("lm_head.weight", torch.float64), ("lm_head.weight", torch.uint8),
        (BLOCKS, torch.bfloat16), (BLOCKS, torch.int8), (BLOCKS, torch.float8_e4m3fn),
    ],
)  # fmt: skip
def test_a_tensor_of_the_wrong_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base = write_random_checkpoint(tmp_path / "base")
    file = base / "model.safetensors"
    edit_tensors(file, lambda tensors: tensors.update({name: torch.zeros(tensors[name].shape, dtype=dtype)}))
    sentence = refusal(base)
    assert f"model.safetensors: tensor '{name}' has the unexpected dtype" in sentence


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_generation_config_that_is_not_one(bad: Path, text: str) -> None:
    (bad / "generation_config.json").write_text(text)
    with pytest.raises(FinetuneError, match=r"generation_config\.json: not a generation configuration"):
        load_base(bad, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_tokenizer_that_is_missing_or_is_not_one(bad: Path, text: str | None) -> None:
    (bad / "tokenizer.json").unlink()
    if text is not None:
        (bad / "tokenizer.json").write_text(text)
    with pytest.raises(FinetuneError, match=r"tokenizer") as refused:
        load_model(bad, device="cpu")
    assert str(bad) in str(refused.value) and "\n" not in str(refused.value)
