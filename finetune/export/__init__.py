"""From a run, a bare adapter or a model to a directory that others load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.export.subject import Subject

FORMATS = ("adapter", "bf16", "gguf", "gguf-lora", "mxfp4", "openai", "sglang-lora")
# An adapter in another layout: nothing to write without one.
OF_AN_ADAPTER = ("adapter", "gguf-lora", "sglang-lora")
# Share of the gain on held-out conversations that rounding to MXFP4 has to keep.
KEPT_AT_LEAST = 0.9
# MXFP4 experts as they are: an adapter has to be merged and rounded to MXFP4 before.
OF_A_MODEL = ("gguf", "openai")


def export(
    where: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    calibrate: str | Path | None = None,
    kept_at_least: float = KEPT_AT_LEAST,
    force: bool = False,
) -> dict[str, Any]:
    """Export `where` as `to` (one of FORMATS) to the new directory `out`.

    `where` is a run, an adapter directory, or, for formats of whole models, a checkpoint directory, a hub id
    or nano. `base` names the base of a bare adapter, and may be left out where the adapter names it itself.
    `calibrate` and `kept_at_least` are for mxfp4: a file of conversations to fit the rounding to (a run's own
    data without it), and the share of the tuned model's gain that has to be kept.
    Returns what `out`/finetune_export.json says.

    Raises:
        FinetuneError: an unknown format, nothing to export, another base, or `out` exists without `force`;
            the rounding to MXFP4 keeps too little.
    """
    if to not in FORMATS:
        raise FinetuneError(f"there is no export format {to!r}; known are {', '.join(FORMATS)}")
    if calibrate is not None and to != "mxfp4":
        raise FinetuneError(f"{to} is not fitted to conversations; only mxfp4 is", at=str(calibrate))
    from finetune.export.subject import find_subject

    subject = find_subject(where, base)
    if to in (*OF_AN_ADAPTER, "mxfp4") and subject.tuned is None:
        raise FinetuneError(f"there is no finished adapter here to export as {to}", at=str(where))
    if to in OF_A_MODEL and subject.tuned is not None:
        raise FinetuneError(
            f"{to} holds a model's weights as they are, with no adapter merged in; export mxfp4 first, "
            f"and then that directory as {to}",
            at=str(where),
        )
    if to == "adapter":
        from finetune.export.adapter import export_adapter

        return export_adapter(subject, Path(out), force=force)
    if to == "mxfp4":
        write = partial(_write_mxfp4, subject, calibrate=calibrate, kept_at_least=kept_at_least)
    else:
        write = partial(_write, subject, to)
    return _export(subject, to, Path(out), write, force=force)


# Writes the format's own files to a folder; returns the proof's figures and the card's section on use.
Write = Callable[[Path], tuple[dict[str, Any], str]]


def _export(subject: Subject, to: str, out: Path, write: Write, *, force: bool) -> dict[str, Any]:
    """What all formats but the adapter share: the folder, its companions, card and record."""
    from finetune.export.bundle import copy_companions, new_directory, write_manifest
    from finetune.export.card import model_card

    mark = f"{to} {subject.facts()}"
    with new_directory(out, force=force, resume=mark if to == "bf16" else None) as folder:
        proof, use = write(folder)
        copy_companions(subject.base.path, folder)
        (folder / "README.md").write_text(
            model_card(subject, use, whole=to not in OF_AN_ADAPTER), encoding="utf-8"
        )
        return write_manifest(folder, {"format": to, **subject.facts(), "proof": proof})


def _write(subject: Subject, to: str, folder: Path) -> tuple[dict[str, Any], str]:
    from finetune.export import bf16, dialect, gguf, gguf_lora, openai, sglang_lora

    if to == "bf16":
        return bf16.write_bf16(subject, folder), dialect.MERGED_USE
    if to == "gguf":
        return gguf.write_gguf(subject, folder), gguf.USE
    if to == "openai":
        return openai.write_openai(subject, folder), openai.USE
    assert subject.tuned is not None
    if to == "gguf-lora":
        return gguf_lora.write_gguf_lora(subject, subject.tuned, folder), gguf_lora.USE
    return sglang_lora.write_sglang_lora(subject, subject.tuned, folder), sglang_lora.USE


def _write_mxfp4(
    subject: Subject, folder: Path, *, calibrate: str | Path | None, kept_at_least: float
) -> tuple[dict[str, Any], str]:
    from finetune.export import dialect, mxfp4
    from finetune.export.passages import find_passages

    passages = find_passages(subject, Path(calibrate) if calibrate else None)
    return mxfp4.write_mxfp4(subject, folder, passages, kept_at_least=kept_at_least), dialect.MERGED_USE
