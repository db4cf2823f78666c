"""Merging into MXFP4: what is written, what stays, what is measured, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export import export
from finetune.export.passages import find_passages
from finetune.export.subject import find_subject
from finetune.model import add_lora, load_adapter, load_base, save_adapter
from tests.checkpoints import write_random_checkpoint
from tests.export_kit import read_tensors, write_talk
from tests.model_kit import our_model, random_ids, relative_error, stock_model

# Experts no power of two, widths multiples of 32 only, layers odd.
ODD: dict[str, Any] = {"hidden": 96, "layers": 3, "experts": 5, "top_k": 2, "intermediate": 64, "shards": 2}
UNTOUCHED = 3  # an expert that the adapter leaves alone


def write_adapter(path: Path, base: Path, size: float) -> Path:
    torch.manual_seed(1)
    targets = ["attention", "experts", "router"]
    lora = add_lora(load_base(base, dtype=torch.float32, device="cpu"), rank=2, alpha=4, targets=targets)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
            if ".experts." in name:
                parameter.data[:, UNTOUCHED :: ODD["experts"]] = 0
    save_adapter(lora, path, base=base)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base") / "base", tokenizer="bytes", **ODD)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base, 0.05)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("talk") / "talk.jsonl")


@pytest.fixture(scope="module")
def fitted(base: Path, adapter: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "out"
    export(adapter, "mxfp4", out, base=str(base), calibrate=talk, kept_at_least=0)
    return out


def proof(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "finetune_export.json").read_text())["proof"]
    return found


def test_names_shapes_dtypes_and_shards_are_the_base_s(base: Path, fitted: Path) -> None:
    before, after = read_tensors(base), read_tensors(fitted)
    assert before.keys() == after.keys()
    assert all(t.shape == after[n].shape and t.dtype == after[n].dtype for n, t in before.items())
    index = "model.safetensors.index.json"
    assert json.loads((fitted / index).read_text()) == json.loads((base / index).read_text())


def test_bytes_stay_where_no_delta_landed(base: Path, fitted: Path) -> None:
    after = read_tensors(fitted)
    for name, before in read_tensors(base).items():
        if name.endswith(("_blocks", "_scales")):
            same = (after[name] == before).flatten(1).all(1)
            assert same[UNTOUCHED]
            assert name.endswith("_scales") or not same.all()
        elif name.endswith(("_proj.weight", "router.weight")):
            assert not torch.equal(after[name], before)
        else:
            assert torch.equal(after[name], before)


def test_the_result_loads_in_stock_transformers_and_equals_our_loader(fitted: Path) -> None:
    ids = random_ids(2, 20, vocab=256)
    with torch.no_grad():
        assert relative_error(our_model(fitted)(ids).logits, stock_model(fitted)(ids).logits) < 1e-4


def held_out_logs(passages: Any, model: Any) -> Tensor:
    """Log-probabilities of the vocabulary at every learned token that is held out, [N, V]."""
    logs = []
    for passage in passages.held_out:
        batch = {"input_ids": passage.ids[None], "position_ids": passage.positions[None]}
        with torch.no_grad():
            logs.append(model(**batch, use_cache=False).logits[0].log_softmax(-1))
    learned = torch.cat([p.targets for p in passages.held_out]) != -100
    return torch.cat(logs)[learned]


def distance(log: Tensor, tuned: Tensor) -> float:
    return float(F.kl_div(log, tuned, log_target=True, reduction="batchmean"))


def test_the_figures_are_those_of_whole_models(base: Path, adapter: Path, talk: Path, fitted: Path) -> None:
    kept = proof(fitted)["kept"]
    passages = find_passages(find_subject(adapter, str(base)), talk)
    assert passages is not None
    models = {
        "base": our_model(base),
        "tuned": load_adapter(our_model(base), adapter, base=base),
        "export": our_model(fitted),
    }
    log = {name: held_out_logs(passages, model) for name, model in models.items()}
    targets = torch.cat([p.targets for p in passages.held_out])
    targets = targets[targets != -100]
    for name, found in log.items():
        assert kept["loss"][name] == pytest.approx(float(F.nll_loss(found, targets)), rel=1e-4)
    assert kept["kl_to_tuned"] == pytest.approx(distance(log["export"], log["tuned"]), rel=1e-3)
    assert kept["tokens"] == len(targets)


def test_fitting_brings_the_outputs_nearer_than_rounding(
    base: Path, adapter: Path, talk: Path, fitted: Path, tmp_path: Path
) -> None:
    export(adapter, "mxfp4", tmp_path / "nearest", base=str(base))
    assert "nearest" in proof(tmp_path / "nearest")["rounding"]
    assert "kept" not in proof(tmp_path / "nearest")
    passages = find_passages(find_subject(adapter, str(base)), talk)
    tuned = held_out_logs(passages, load_adapter(our_model(base), adapter, base=base))
    far, near = (
        distance(held_out_logs(passages, our_model(path)), tuned) for path in (tmp_path / "nearest", fitted)
    )
    assert near < 0.5 * far


def test_an_export_that_keeps_too_little_is_an_error_and_leaves_nothing(
    base: Path, adapter: Path, talk: Path, tmp_path: Path
) -> None:
    with pytest.raises(FinetuneError, match="serve the adapter instead"):
        export(adapter, "mxfp4", tmp_path / "out", base=str(base), calibrate=talk, kept_at_least=1.01)
    assert not list(tmp_path.iterdir())


def test_a_delta_that_vanishes_in_rounding_is_an_error(base: Path, tmp_path: Path) -> None:
    small = write_adapter(tmp_path / "adapter", base, 1e-6)
    with pytest.raises(FinetuneError, match="vanish in MXFP4"):
        export(small, "mxfp4", tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_mxfp4_is_refused(tmp_path: Path) -> None:
    merged = write_random_checkpoint(tmp_path / "base", experts_as="bf16", tokenizer="bytes", **ODD)
    small = write_adapter(tmp_path / "adapter", merged, 0.05)
    with pytest.raises(FinetuneError, match="not MXFP4"):
        export(small, "mxfp4", tmp_path / "out", base=str(merged))


def test_a_model_without_an_adapter_and_other_formats_with_a_file_are_refused(base: Path, talk: Path) -> None:
    with pytest.raises(FinetuneError, match="no finished adapter"):
        export(base, "mxfp4", base.parent / "out")
    with pytest.raises(FinetuneError, match="only what is merged into MXFP4 is"):
        export(base, "bf16", base.parent / "out", calibrate=talk)
