"""Export of the adapter in PEFT's stock layout, as PEFT, transformers and vLLM load it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from finetune.errors import FinetuneError
from finetune.export.bundle import copy_companions, new_directory, write_manifest
from finetune.export.card import model_card
from finetune.export.peft_files import CONFIG, WEIGHTS, Adapter, Sizes, check, complete, expert_deltas
from finetune.model import fingerprint
from finetune.model.places import BASE_RECORD

if TYPE_CHECKING:
    from finetune.rundir import RunDir


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to: as the user named it, and where its files are."""

    name: str
    path: Path


def export_adapter(
    adapter_dir: Path, base: Base, out: Path, *, run: RunDir | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the adapter directory `out` and return what its finetune_export.json says.

    The tensors are those that were trained, bit for bit (read back and compared); both expert parameters are
    there whenever the adapter learns experts. An adapter of attention alone is exported as that.

    Raises:
        FinetuneError: the adapter is missing, of another base, unfit or changes no expert; `out` is there.
    """
    mark = fingerprint(base.path)
    _check_base(adapter_dir, base, mark)
    sizes = Sizes.of(base.path)
    trained = Adapter.read(adapter_dir)
    check(trained, sizes, adapter_dir)
    adapter = complete(trained, sizes)
    deltas = expert_deltas(adapter, sizes.experts)
    if adapter.learns_experts and not deltas.any():
        raise FinetuneError(
            "this adapter changes no expert: the deltas of all experts are zero", at=str(adapter_dir)
        )
    with new_directory(out, force=force) as folder:
        alpha = float(adapter.config["lora_alpha"])
        config = {
            **adapter.config,
            "base_model_name_or_path": base.name,
            "inference_mode": True,
            # PEFT and vLLM declare an integer.
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if adapter is trained:
            shutil.copyfile(adapter_dir / WEIGHTS, folder / WEIGHTS)
        else:
            # Written by Python, not by safetensors: a full disk is then an OSError, which gets its sentence.
            (folder / WEIGHTS).write_bytes(save(adapter.tensors, metadata={"format": "pt"}))
        record = {"where": base.name, "fingerprint": mark}
        (folder / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        copy_companions(base.path, folder)
        (folder / "README.md").write_text(model_card(adapter, base.name, mark, run), encoding="utf-8")
        facts = {
            "format": "adapter",
            "source": {"run": run.path.name if run else None, "adapter": adapter_dir.name},
            "base": {"name": base.name, "fingerprint": mark},
            "proof": _proof(trained, adapter, folder, deltas),
        }
        return write_manifest(folder, facts)


def _check_base(adapter_dir: Path, base: Base, mark: str) -> None:
    """Our adapters record the fingerprint of their base; of a stock PEFT adapter the sizes alone can tell."""
    file = adapter_dir / BASE_RECORD
    if not file.is_file():
        return
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FinetuneError(
            f"the record of the adapter's base cannot be read: {error!r}", at=str(file)
        ) from error
    if recorded != mark:
        raise FinetuneError(f"this adapter was trained on another base than {base.name}", at=str(adapter_dir))


def _proof(trained: Adapter, adapter: Adapter, folder: Path, deltas: torch.Tensor) -> dict[str, Any]:
    """Figures of what was written, from the file itself.

    Raises:
        FinetuneError: the file does not hold what was trained.
    """
    written = load_file(folder / WEIGHTS)
    same = written.keys() == adapter.tensors.keys() and all(
        torch.equal(written[key], tensor) for key, tensor in adapter.tensors.items()
    )
    if not same:
        raise FinetuneError(
            "the adapter read back differs from the one that was trained", at=str(folder / WEIGHTS)
        )
    return {
        "equals_trained_bitwise": True,
        "tensors": len(written),
        "zero_tensors_added": len(adapter.tensors) - len(trained.tensors),
        "expert_deltas": deltas.numel(),
        "expert_deltas_not_zero": int((deltas > 0).sum()),
        "expert_delta_norm": float(deltas.norm()),
    }
