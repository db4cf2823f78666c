"""A checkpoint loads as released, mapped from its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.model import fingerprint, hash_frozen, inspect_checkpoint, load_model
from finetune.model.experts import DenseExperts, PackedExperts
from tests.checkpoints import write_random_checkpoint
from tests.model_kit import our_model, random_ids, relative_error, stock_model
from tests.unit.test_model_attention import LargestTensor


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


# What a good checkpoint becomes


@pytest.mark.parametrize("experts_as", ["mxfp4", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"shards": 3},
        {"hidden": 96, "layers": 3, "experts": 6, "top_k": 3, "intermediate": 160, "heads": 6, "kv_heads": 2},
        {"layers": 1, "experts": 1, "top_k": 1, "heads": 2, "kv_heads": 1, "head_dim": 8},
    ],
    ids=["sharded", "odd", "one-expert"],
)
def test_logits_are_those_of_stock_transformers(
    tmp_path: Path, experts_as: Any, shape: dict[str, Any]
) -> None:
    base = write_random_checkpoint(tmp_path / "base", experts_as=experts_as, **shape)
    ids = random_ids(2, 40)
    assert (logits(our_model(base), ids) - logits(stock_model(base), ids)).abs().max() < 1e-5


def test_hidden_states_are_those_of_stock_transformers(tmp_path: Path) -> None:
    base, ids = write_random_checkpoint(tmp_path / "base"), random_ids(2, 40)
    ours, stock = our_model(base), stock_model(base)
    with torch.no_grad():
        found, expected = (model(ids, output_hidden_states=True).hidden_states for model in (ours, stock))
    assert len(found) == len(expected) == 3
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_the_router_loss_is_off_unless_asked_for(tmp_path: Path) -> None:
    base, ids = write_random_checkpoint(tmp_path / "base"), random_ids(2, 40)
    ours, stock = our_model(base), stock_model(base)
    plain, asked = ours(ids, labels=ids), ours(ids, labels=ids, output_router_logits=True)
    expected = stock(ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None
    assert relative_error(asked.aux_loss, expected.aux_loss) < 1e-5
    assert relative_error(asked.loss, expected.loss) < 1e-5


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "base")
    ids = random_ids(1, 40)
    found = logits(our_model(base, torch.bfloat16), ids)
    assert found.dtype == torch.bfloat16
    # Some twenty roundings of up to 2 ** -9 each on the way through two layers.
    assert relative_error(found, logits(our_model(base), ids)) < 20 * 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_stay_in_the_bytes_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_random_checkpoint(tmp_path / "base")
    experts = our_model(base, dtype).model.layers[0].mlp.experts
    released = load_file(base / "model.safetensors")
    assert isinstance(experts, PackedExperts)
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = experts.get_parameter(name), experts.get_parameter(f"{name}_scales")
        assert blocks.dtype == scales.dtype == torch.uint8
        assert torch.equal(blocks, released[f"model.layers.0.mlp.experts.{name}_blocks"])
        assert torch.equal(scales, released[f"model.layers.0.mlp.experts.{name}_scales"])


def test_a_merged_checkpoint_loads_through_the_same_function(tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "base", experts_as="bf16", vocab=266, tokenizer="bytes")
    model, tokenizer = load_model(base, device="cpu")
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), DenseExperts)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.padding_side == "left" and inspect_checkpoint(base).kind == "bf16"


def test_everything_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    model = our_model(write_random_checkpoint(tmp_path / "base"))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.config.output_router_logits


def test_the_checkpoints_stop_tokens_end_generation(tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "base")
    stops = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    assert our_model(base).generation_config.eos_token_id == stops


def test_rows_with_gaps_need_no_copy_of_the_head(tmp_path: Path) -> None:
    model = our_model(write_random_checkpoint(tmp_path))
    last = torch.randn(4, 9, model.config.hidden_size)[:, -1:]  # of several prompts, as generation asks
    with torch.no_grad(), LargestTensor() as largest:
        found = model.lm_head(last)
    assert largest.elements == model.lm_head.weight.numel()  # itself, transposed
    assert relative_error(found, last @ model.lm_head.weight.t()) < 1e-6


def test_inspection_counts_what_the_checkpoint_holds(tmp_path: Path) -> None:
    packed = inspect_checkpoint(write_random_checkpoint(tmp_path / "packed", shards=3))
    dense = inspect_checkpoint(write_random_checkpoint(tmp_path / "dense", experts_as="bf16"))
    assert (packed.kind, packed.layers, packed.experts) == ("mxfp4", 2, 4)
    assert packed.weights == dense.weights == sum(p.numel() for p in our_model(dense.path).parameters())
    assert packed.bytes == sum(
        t.nbytes for f in packed.path.glob("*.safetensors") for t in load_file(f).values()
    )


# In a process of its own, since memory that other tests freed could be used again unseen.
MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from finetune.model import load_base

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

peak, loading = 0, True
def watch():
    global peak
    while loading:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)

# What the first load imports is not the model's.
load_base(Path(sys.argv[1]), dtype=torch.bfloat16, device="cpu")
before = anonymous_bytes()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_base(Path(sys.argv[2]), dtype=torch.bfloat16, device="cpu")
loading = False
watcher.join()
peak = max(peak, anonymous_bytes())
assert sum(p.nbytes for p in model.parameters()) > 140e6
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_loading_takes_less_memory_than_a_tenth_of_the_file(tmp_path: Path) -> None:
    small = write_random_checkpoint(tmp_path / "small")
    large = write_random_checkpoint(
        tmp_path / "large", hidden=512, intermediate=512, experts=64, layers=6, shards=2
    )
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert size > 140e6 and int(done.stdout.split()[-1]) < 0.1 * size


# What tells weights apart


def test_the_fingerprint_names_the_weights_not_their_files(tmp_path: Path) -> None:
    one = write_random_checkpoint(tmp_path / "one")
    three = write_random_checkpoint(tmp_path / "three", shards=3)
    other = write_random_checkpoint(tmp_path / "other", seed=1)
    assert fingerprint(one) == fingerprint(three) != fingerprint(other)


def test_the_hash_of_a_model_is_that_of_its_bytes(tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "base")
    model = our_model(base)
    before = hash_frozen(model)
    assert hash_frozen(our_model(base)) == before
    blocks = model.model.layers[1].mlp.experts.down_proj
    blocks.data = blocks.data.clone()
    blocks.data[3, 63, 1, 15] ^= 1
    assert hash_frozen(model) != before
