"""Export of the adapter in PEFT's stock layout, as PEFT, transformers and vLLM load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from finetune.errors import FinetuneError
from finetune.export.bundle import copy_companions, new_directory, write_manifest
from finetune.export.card import model_card
from finetune.export.peft_files import CONFIG, WEIGHTS, Adapter
from finetune.export.subject import Subject
from finetune.model.places import BASE_RECORD


def export_adapter(subject: Subject, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the adapter directory `out` and return what its finetune_export.json says.

    The tensors are those that were trained, bit for bit (read back and compared); both expert parameters are
    there whenever the adapter learns experts. An adapter of attention alone is exported as that.

    Raises:
        FinetuneError: there is no adapter, or `out` is there.
    """
    base, tuned = subject.base, subject.tuned
    if tuned is None:
        raise FinetuneError("there is no finished adapter here", at=base.name)
    adapter, trained = tuned.adapter, tuned.trained
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
            shutil.copyfile(tuned.folder / WEIGHTS, folder / WEIGHTS)
        else:
            # Written by Python, not by safetensors: a full disk is then an OSError, which gets its sentence.
            (folder / WEIGHTS).write_bytes(save(adapter.tensors, metadata={"format": "pt"}))
        record = {"where": base.name, "fingerprint": subject.fingerprint}
        (folder / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        copy_companions(base.path, folder)
        (folder / "README.md").write_text(model_card(subject), encoding="utf-8")
        proof = _proof(trained, adapter, folder, tuned.deltas)
        facts = {"format": "adapter", **subject.facts(), "proof": proof}
        return write_manifest(folder, facts)


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
