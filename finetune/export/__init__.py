"""From a run, a bare adapter or a model to a directory that others load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.export.merged import Rounding
    from finetune.export.subject import Subject

FORMATS = ("adapter", "bf16", "gguf", "gguf-lora", "mxfp4", "openai", "sglang-lora")
# An adapter in another layout: nothing to write without one.
OF_AN_ADAPTER = ("adapter", "gguf-lora", "sglang-lora")
# A whole model's weights as they are: an adapter is merged before.
OF_A_MODEL = ("gguf", "openai")
# Those that a killed export goes on with, instead of starting anew.
RESUMED = ("bf16", "mxfp4", *OF_A_MODEL)
# Share of the gain on held-out conversations that rounding to MXFP4 has to keep.
KEPT_AT_LEAST = 0.9


def export(
    where: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    calibrate: str | Path | None = None,
    kept_at_least: float = KEPT_AT_LEAST,
    dense: Literal["bf16", "q8_0"] = "bf16",
    force: bool = False,
) -> dict[str, Any]:
    """Export `where` as `to` (one of FORMATS) to the new directory `out`.

    `where` is a run, an adapter directory, or, for formats of whole models, a checkpoint directory, a hub id
    or nano. `base` names the base of a bare adapter, and may be left out where the adapter names it itself.
    `calibrate` and `kept_at_least` are for merging into MXFP4 (mxfp4, and gguf and openai of a tuned model):
    a file of conversations to fit the rounding to (a run's own data without it), and the share of the tuned
    model's gain that has to be kept. `dense` is the number format of gguf's attention and embeddings.
    Returns what `out`/finetune_export.json says.

    Raises:
        FinetuneError: an unknown format, nothing to export, another base, or `out` exists without `force`;
            the rounding to MXFP4 keeps too little.
    """
    _check_words(to, calibrate, dense)
    from finetune.export.subject import find_subject

    subject = find_subject(where, base)
    if to in (*OF_AN_ADAPTER, "mxfp4") and subject.tuned is None:
        raise FinetuneError(f"there is no finished adapter here to export as {to}", at=str(where))
    if calibrate is not None and subject.tuned is None:
        raise FinetuneError("there is no adapter here whose merging could be fitted", at=str(where))
    if to == "adapter":
        from finetune.export.adapter import export_adapter

        return export_adapter(subject, Path(out), force=force)
    from finetune.export.merged import Rounding

    rounding = Rounding(Path(calibrate) if calibrate else None, kept_at_least)
    return _export(subject, to, Path(out), partial(_write, subject, to, rounding, dense), force=force)


def _check_words(to: str, calibrate: str | Path | None, dense: str) -> None:
    """What can be refused before anything is read."""
    if to not in FORMATS:
        raise FinetuneError(f"there is no export format {to!r}; known are {', '.join(FORMATS)}")
    if calibrate is not None and to not in ("mxfp4", *OF_A_MODEL):
        raise FinetuneError(
            f"{to} is not fitted to conversations; only what is merged into MXFP4 is", at=str(calibrate)
        )
    if dense not in ("bf16", "q8_0"):
        raise FinetuneError(f"there is no number format {dense!r} for dense tensors; known are bf16, q8_0")
    if dense != "bf16" and to != "gguf":
        raise FinetuneError(f"{to} keeps its dense tensors in bf16; only gguf can have them in {dense}")


# Writes the format's own files to a folder; returns the proof's figures and the card's section on use. Under
# `sha256` are sums of files that were taken while writing them.
Write = Callable[[Path], tuple[dict[str, Any], str]]


def _export(subject: Subject, to: str, out: Path, write: Write, *, force: bool) -> dict[str, Any]:
    """What all formats but the adapter share: the folder, its companions, card and record."""
    from finetune.export.bundle import copy_companions, new_directory, write_manifest
    from finetune.export.card import model_card

    facts = {"format": to, **subject.facts()}
    mark = f"{to} {subject.facts()}" if to in RESUMED else None
    with new_directory(out, force=force, resume=mark) as folder:
        proof, use = write(folder)
        copy_companions(subject.base.path, folder)
        card = model_card(subject, use, whole=to not in OF_AN_ADAPTER, proof=proof)
        (folder / "README.md").write_text(card, encoding="utf-8")
        sums = proof.pop("sha256", {})
        return write_manifest(folder, {**facts, "proof": proof}, sums)


def _write(
    subject: Subject, to: str, rounding: Rounding, dense: Literal["bf16", "q8_0"], folder: Path
) -> tuple[dict[str, Any], str]:
    from finetune.export import bf16, dialect, gguf, gguf_lora, merged, openai, sglang_lora

    if to == "bf16":
        return bf16.write_bf16(subject, folder), dialect.MERGED_USE
    if to == "mxfp4":
        return merged.merge_into_mxfp4(subject, folder, rounding), dialect.MERGED_USE
    if to == "gguf":
        return merged.lay_out(subject, folder, rounding, partial(gguf.write_gguf, dense=dense)), gguf.USE
    if to == "openai":
        openai.check_packed(subject)
        return merged.lay_out(subject, folder, rounding, openai.write_openai), openai.USE
    assert subject.tuned is not None
    if to == "gguf-lora":
        return gguf_lora.write_gguf_lora(subject, subject.tuned, folder), gguf_lora.USE
    return sglang_lora.write_sglang_lora(subject, subject.tuned, folder), sglang_lora.USE
