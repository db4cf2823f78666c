"""Mistakes with exports, imports and their judges, as those of `tests.mistakes`."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from finetune.recipe import load_recipe
from finetune.rundir import RunDir
from tests.checkpoints import write_random_checkpoint
from tests.export_kit import write_adapter
from tests.mistakes import Mistake, Spoil, file


def adapter(project: Path) -> None:
    write_adapter(project / "adapter", project / "base")


def then(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(project: Path) -> None:
        for one in spoils:
            one(project)

    return spoil


def run_without_adapter(project: Path) -> None:
    run = RunDir.create(load_recipe(project / "recipe.yaml"), project / "runs")
    (project / "runs" / "latest").unlink()
    run.path.rename(project / "runs" / "begun")


def another_base(project: Path) -> None:
    write_random_checkpoint(project / "other", tokenizer="bytes", seed=5)


def gguf_of_a_llama(project: Path) -> None:
    writer = gguf.GGUFWriter(project / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TO = ("--out", "out", "--to")
NO_ADAPTER = "there is no finished adapter here"
EXPORTS = [
    Mistake(
        "export of a run without an adapter",
        ("export", "runs/begun", *TO, "gguf"),
        f"runs/begun: {NO_ADAPTER}; finetune train runs/begun goes on with it",
        run_without_adapter,
    ),
    Mistake(
        "model without an adapter",
        ("export", "base", *TO, "gguf-lora"),
        f"base: {NO_ADAPTER} to export as gguf-lora",
    ),
    Mistake(
        "no such format",
        ("export", "base", *TO, "ggml"),
        "there is no export format 'ggml'; known are adapter, bf16, gguf, gguf-lora, mxfp4, openai, "
        "sglang-lora",
    ),
    Mistake(
        "export is there",
        ("export", "adapter", "--out", "base", "--to", "mxfp4"),
        "HERE/base: this exists already; choose another folder or use --force to replace it",
        adapter,
    ),
    Mistake(
        "export of an adapter of another base",
        ("export", "adapter", "--base", "other", *TO, "gguf"),
        "adapter: this adapter was trained on another base than other",
        then(adapter, another_base),
    ),
    Mistake(
        "export of a corrupt adapter",
        ("export", "adapter", "--base", "base", *TO, "openai"),
        "adapter: this adapter cannot be read: ...",
        then(adapter, file("adapter/adapter_model.safetensors", b"\0" * 999)),
    ),
    Mistake(
        "conversations for what is not rounded",
        ("export", "adapter", *TO, "bf16", "--calibrate", "rows.jsonl"),
        "rows.jsonl: bf16 is not fitted to conversations; only what is merged into MXFP4 is",
        adapter,
    ),
    Mistake(
        "conversations that are not there",
        ("export", "adapter", *TO, "mxfp4", "--calibrate", "nope.jsonl"),
        "nope.jsonl: ...",
        adapter,
    ),
    Mistake(
        "small numbers where there are none",
        ("export", "base", *TO, "openai", "--dense", "q8_0"),
        "openai keeps its dense tensors in bf16; only gguf can have them in q8_0",
    ),
    Mistake(
        "merge that keeps too little",
        ("export", "adapter", *TO, "gguf", "--calibrate", "rows.jsonl", "--kept-at-least", "1.01"),
        "rounding to MXFP4 keeps ...% of the adapter's ... on held-out conversations, not 101%; serve the "
        "adapter instead (--to adapter), or accept less with --kept-at-least",
        adapter,
    ),
    Mistake(
        "tokenizer that llama.cpp cannot read",
        ("export", "base", *TO, "gguf"),
        "base/tokenizer.json: llama.cpp cannot read a tokenizer without merges",
    ),
]
IMPORTS = [
    Mistake(
        "GGUF of another architecture",
        ("import", "llama.gguf", "--out", "out"),
        "llama.gguf: this GGUF holds a model of the architecture 'llama', not gpt-oss",
        gguf_of_a_llama,
    ),
    Mistake(
        "GGUF that is cut off",
        ("import", "cut.gguf", "--out", "out"),
        "cut.gguf: this cannot be read as a GGUF: it is no GGUF, or cut off",
        file("cut.gguf", b"GGUF and then nothing"),
    ),
    Mistake(
        "nothing to import",
        ("import", "runs", "--out", "out"),
        "runs: nothing to import here: neither a .gguf, nor OpenAI's original/, nor a checkpoint",
    ),
    Mistake(
        "verify what is no export",
        ("verify", "base"),
        "base: this is not an export: it has no finetune_export.json",
    ),
]
MISTAKES_OF_EXPORTING = [*EXPORTS, *IMPORTS]
