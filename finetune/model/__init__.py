"""gpt-oss in memory: the number format, packed experts, attention over packed documents, loading, LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.model.checkpoint import CheckpointInfo, fingerprint, inspect_checkpoint
from finetune.model.places import Place, resolve

if TYPE_CHECKING:
    from finetune.model.kept import keep_decoded
    from finetune.model.loading import hash_frozen, load_base, load_model, load_tokenizer
    from finetune.model.lora import CoverageCheck, add_lora, load_adapter, save_adapter

# Found on first use: torch and transformers take seconds to import, and checking a recipe needs neither.
_LATE = {
    "hash_frozen": "loading", "load_base": "loading", "load_model": "loading", "load_tokenizer": "loading",
    "keep_decoded": "kept", "CoverageCheck": "lora", "add_lora": "lora", "load_adapter": "lora",
    "save_adapter": "lora",
}  # fmt: skip

__all__ = [
    "CheckpointInfo", "CoverageCheck", "Place", "add_lora", "fingerprint", "hash_frozen",
    "inspect_checkpoint", "keep_decoded", "load_adapter", "load_base", "load_model", "load_tokenizer",
    "resolve", "save_adapter",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATE:
        from importlib import import_module

        return getattr(import_module(f"finetune.model.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
