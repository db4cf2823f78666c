"""From a run, a bare adapter or a model to a directory that others load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.export.subject import Subject

FORMATS = ("adapter", "bf16", "gguf", "gguf-lora", "openai", "sglang-lora")
# An adapter in another layout: nothing to write without one.
OF_AN_ADAPTER = ("adapter", "gguf-lora", "sglang-lora")
# MXFP4 experts as they are: an adapter has to be merged and rounded to MXFP4 before.
OF_A_MODEL = ("gguf", "openai")


def export(
    where: str | Path, to: str, out: str | Path, *, base: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Export `where` as `to` (one of FORMATS) to the new directory `out`.

    `where` is a run, an adapter directory, or, for formats of whole models, a checkpoint directory, a hub id
    or nano. `base` names the base of a bare adapter, and may be left out where the adapter names it itself.
    Returns what `out`/finetune_export.json says.

    Raises:
        FinetuneError: an unknown format, nothing to export, another base, or `out` exists without `force`.
    """
    if to not in FORMATS:
        raise FinetuneError(f"there is no export format {to!r}; known are {', '.join(FORMATS)}")
    from finetune.export.subject import find_subject

    subject = find_subject(where, base)
    if to in OF_AN_ADAPTER and subject.tuned is None:
        raise FinetuneError(f"there is no finished adapter here to export as {to}", at=str(where))
    if to in OF_A_MODEL and subject.tuned is not None:
        instead = "gguf-lora, or bf16 and that directory to gguf" if to == "gguf" else "adapter or bf16"
        raise FinetuneError(
            f"{to} holds a model's weights as they are, with no adapter merged in; export {instead}",
            at=str(where),
        )
    if to == "adapter":
        from finetune.export.adapter import export_adapter

        return export_adapter(subject, Path(out), force=force)
    return _export(subject, to, Path(out), force=force)


def _export(subject: Subject, to: str, out: Path, *, force: bool) -> dict[str, Any]:
    """What all formats but the adapter share: the folder, its companions, card and record."""
    from finetune.export.bundle import copy_companions, new_directory, write_manifest
    from finetune.export.card import model_card

    mark = f"{to} {subject.facts()}"
    with new_directory(out, force=force, resume=mark if to == "bf16" else None) as folder:
        proof, use = _write(subject, to, folder)
        copy_companions(subject.base.path, folder)
        (folder / "README.md").write_text(
            model_card(subject, use, whole=to not in OF_AN_ADAPTER), encoding="utf-8"
        )
        return write_manifest(folder, {"format": to, **subject.facts(), "proof": proof})


def _write(subject: Subject, to: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Write the format's own files; returns the proof's figures and the card's section on use."""
    from finetune.export import bf16, gguf, gguf_lora, openai, sglang_lora

    if to == "bf16":
        return bf16.write_bf16(subject, folder), bf16.USE
    if to == "gguf":
        return gguf.write_gguf(subject, folder), gguf.USE
    if to == "openai":
        return openai.write_openai(subject, folder), openai.USE
    assert subject.tuned is not None
    if to == "gguf-lora":
        return gguf_lora.write_gguf_lora(subject, subject.tuned, folder), gguf_lora.USE
    return sglang_lora.write_sglang_lora(subject, subject.tuned, folder), sglang_lora.USE
