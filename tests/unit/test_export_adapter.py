from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export import export
from finetune.export.card import model_card
from finetune.export.peft_files import Adapter, expert_deltas
from finetune.export.subject import find_subject
from finetune.model import add_lora, fingerprint, load_adapter, load_base, save_adapter
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from tests.checkpoints import write_random_checkpoint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_random_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny-base", tokenizer="bytes", experts=5
    )
    (path / "LICENSE").write_text("terms of the base")
    return path


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = load_base(base, dtype=torch.float32, device="cpu")
    adapted = add_lora(model, rank=3, alpha=6, targets=["attention", "experts"], rslora=True)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    path = tmp_path_factory.mktemp("trained") / "adapter"
    save_adapter(adapted, path, base=base)
    return path


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def change_config(adapter: Path, **keys: object) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **keys}))


def change_weights(adapter: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    changed = {key: change(key, tensor) for key, tensor in load_file(adapter / WEIGHTS).items()}
    kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
    save_file(kept, adapter / WEIGHTS, metadata={"format": "pt"})


def test_the_export_holds_the_trained_tensors_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    manifest = export(trained, "adapter", tmp_path / "out")
    before, after = load_file(trained / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert manifest["proof"]["equals_trained_bitwise"]


def test_the_config_says_rank_alpha_rslora_and_the_base_as_it_was_named(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    export(trained, "adapter", tmp_path / "out", base="tiny-base")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, True)
    assert isinstance(config["lora_alpha"], int)
    assert config["base_model_name_or_path"] == "tiny-base"
    assert set(config["target_parameters"]) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_the_manifest_lists_the_sha256_of_every_file(trained: Path, base: Path, tmp_path: Path) -> None:
    manifest = export(trained, "adapter", tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "finetune_export.json").read_text())
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"finetune_export.json"}
    assert manifest["files"].keys() == files
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert (manifest["format"], manifest["base"]["fingerprint"]) == ("adapter", fingerprint(base))
    assert (manifest["proof"]["expert_deltas"], manifest["proof"]["expert_deltas_not_zero"]) == (20, 20)


def test_tokenizer_and_licence_of_the_base_come_along(trained: Path, base: Path, tmp_path: Path) -> None:
    export(trained, "adapter", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_an_export_loads_on_its_base_and_on_no_other(trained: Path, base: Path, tmp_path: Path) -> None:
    export(trained, "adapter", tmp_path / "out")
    load_adapter(load_base(base, dtype=torch.float32, device="cpu"), tmp_path / "out", base=base)
    other = write_random_checkpoint(tmp_path / "other", experts=5, seed=1)
    with pytest.raises(FinetuneError, match="other weights"):
        load_adapter(load_base(other, dtype=torch.float32, device="cpu"), tmp_path / "out", base=other)


def test_the_adapter_of_another_base_is_refused(trained: Path, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "other", tokenizer="bytes", experts=5, seed=1)
    with pytest.raises(FinetuneError, match="another base"):
        export(trained, "adapter", tmp_path / "out", base=str(other))


def test_an_adapter_without_record_is_refused_where_its_sizes_do_not_fit(
    adapter: Path, tmp_path: Path
) -> None:
    (adapter / "finetune_base.json").unlink()
    other = write_random_checkpoint(tmp_path / "other", tokenizer="bytes", experts=7)
    with pytest.raises(FinetuneError, match="does not fit this base"):
        export(adapter, "adapter", tmp_path / "out", base=str(other))


def test_an_existing_target_is_kept_unless_forced(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FinetuneError, match="exists already"):
        export(trained, "adapter", out)
    assert (out / "mine.txt").read_text() == "mine"
    export(trained, "adapter", out, force=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_zero_expert_delta_is_an_error_and_leaves_nothing_behind(adapter: Path, tmp_path: Path) -> None:
    change_weights(
        adapter, lambda key, t: torch.zeros_like(t) if ".experts." in key and "lora_B" in key else t
    )
    with pytest.raises(FinetuneError, match="changes no expert"):
        export(adapter, "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
        ({"bias": "all"}, "trained biases"),
        ({"peft_type": "LOHA"}, "only LORA"),
    ],
)
def test_what_vllm_refuses_is_refused(
    adapter: Path, tmp_path: Path, keys: dict[str, object], reason: str
) -> None:
    change_config(adapter, **keys)
    with pytest.raises(FinetuneError, match=reason):
        export(adapter, "adapter", tmp_path / "out")


def test_a_damaged_adapter_is_refused_with_the_tensor_named(adapter: Path, tmp_path: Path) -> None:
    first = "layers.0.self_attn.q_proj.lora_A"
    change_weights(adapter, lambda key, t: t.fill_(float("nan")) if first in key else t)
    with pytest.raises(FinetuneError, match=rf"{first}.* not finite"):
        export(adapter, "adapter", tmp_path / "out")
    change_weights(adapter, lambda key, t: None if first in key else torch.zeros_like(t))
    with pytest.raises(FinetuneError, match=r"only lora_B of self_attn\.q_proj"):
        export(adapter, "adapter", tmp_path / "out")


def test_an_adapter_that_lacks_a_layer_or_its_experts_is_refused(adapter: Path, tmp_path: Path) -> None:
    change_weights(adapter, lambda key, t: None if "layers.1.mlp" in key else t)
    with pytest.raises(FinetuneError, match=r"layer 1 has no LoRA of mlp\.experts"):
        export(adapter, "adapter", tmp_path / "out")
    change_weights(adapter, lambda key, t: None if ".mlp." in key else t)
    with pytest.raises(FinetuneError, match="names expert parameters and holds none"):
        export(adapter, "adapter", tmp_path / "out")


def test_a_full_disk_is_said_and_leaves_nothing_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(FinetuneError, match="no space is left"):
        export(trained, "adapter", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_rank_that_the_tensors_do_not_have_is_refused(adapter: Path, tmp_path: Path) -> None:
    change_config(adapter, r=5)
    with pytest.raises(FinetuneError, match="rank 5"):
        export(adapter, "adapter", tmp_path / "out")


def test_a_trained_output_head_is_refused(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(3, 64)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(FinetuneError, match=r"lm_head\.lora_A\.weight, which is not part"):
        export(adapter, "adapter", tmp_path / "out")


def test_an_unknown_format_and_a_missing_adapter_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="'gguf2'; known are adapter"):
        export(base, "gguf2", tmp_path / "out")
    with pytest.raises(FinetuneError, match="no finished adapter"):
        export(base, "adapter", tmp_path / "out")


def test_delta_norms_equal_those_of_the_deltas_themselves(trained: Path) -> None:
    adapter = Adapter.read(trained)
    norms = expert_deltas(adapter, experts=5)
    key = next(key for key in adapter.tensors if ".experts.base_layer.lora_A" in key)
    a = adapter.tensors[key].view(5, 3, -1)
    b = adapter.tensors[key.replace("lora_A", "lora_B")].view(-1, 3, 5)
    expected = torch.stack([(b[:, :, e] @ a[e]).norm() for e in range(5)]) * 6 / 3**0.5
    keys = [key for key in adapter.tensors if ".experts." in key and key.endswith("lora_A.weight")]
    assert torch.allclose(norms[keys.index(key)].float(), expected, rtol=1e-5)


def test_a_run_is_exported_with_a_card_that_tells_how_it_was_made(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}]}
    recipe = Recipe.model_validate({"name": "tiny", "model": {"base": str(base)}, "data": data})
    run = RunDir.create(recipe, tmp_path / "runs")
    run.update(base={"where": str(base)}, data={"fingerprint": "d47a", "rows": 12, "tokens": 345})
    with pytest.raises(FinetuneError, match=r"no finished adapter here; finetune train .* goes on"):
        export(run.path, "adapter", tmp_path / "out")
    shutil.copytree(trained, run.adapter)
    run.eval_dir.mkdir()
    score = {"value": 0.95, "low": 0.9, "high": 0.975}
    tasks = {"sums": {"metric": "number", "n": 80, "base": {**score, "value": 0.05}, "tuned": score}}
    summary = {"held_out_loss": {"base": 2.5, "tuned": 0.25}, "tasks": tasks}
    (run.eval_dir / "summary.json").write_text(json.dumps(summary))
    manifest = export(run.path, "adapter", tmp_path / "out")
    assert manifest["source"]["run"] == run.path.name
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "rank 3, alpha 6",
        fingerprint(base),
        "`d47a`",
        "rows 12",
        "95.0% (90.0% to 97.5%)",
        "2.5000",
    ):
        assert fact in card
    assert "rows.jsonl" in card
    assert str(tmp_path) not in card and str(base) not in card, "no folders of this machine"


def test_the_card_names_a_rank_that_vllm_takes_and_that_holds_every_target(trained: Path) -> None:
    small = find_subject(trained, None)
    assert small.tuned is not None
    for largest, said in ((3, "--max-lora-rank 8"), (20, "--max-lora-rank 32"), (600, "over 512")):
        config = {**small.tuned.adapter.config, "rank_pattern": {"q_proj": largest}}
        adapter = replace(small.tuned.adapter, config=config)
        assert said in model_card(replace(small, tuned=replace(small.tuned, adapter=adapter)))
