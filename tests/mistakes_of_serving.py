"""Mistakes about other engines and reports: see `tests.mistakes`. The exports here have no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.launch_kit import write_export
from tests.mistakes import Mistake


def exported(export_format: str) -> Callable[[Path], None]:
    def spoil(project: Path) -> None:
        write_export(project / "out", export_format, base="base")

    return spoil


def failed_proof(project: Path) -> None:
    file = write_export(project / "out", "adapter", base="base") / "finetune_export.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "proof": {"verified": {"passed": False}}}))


def changed(project: Path) -> None:
    file = write_export(project / "out", "gguf") / "finetune_export.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "files": {"model.gguf": "0"}}))


MISTAKES_OF_SERVING = [
    Mistake(
        "engine not installed",
        ("serve", "out", "--engine", "vllm"),
        "vLLM is not installed here (pip install vllm); the command above runs where it is",
        exported("adapter"),
    ),
    Mistake(
        "export of another engine",
        ("serve", "out", "--engine", "sglang"),
        "sglang cannot load an export of format gguf-lora (it takes mxfp4, bf16, sglang-lora); write one "
        "with: finetune export runs/mine-20260101-000000 --to mxfp4 --out mxfp4-export",
        exported("gguf-lora"),
    ),
    Mistake(
        "adapter without its base as a GGUF",
        ("serve", "out", "--engine", "llama.cpp"),
        "llama.cpp needs the adapter's base as a GGUF too; write one with: "
        "finetune export base --to gguf --out DIR, and name it with --base DIR",
        exported("gguf-lora"),
    ),
    Mistake(
        "model in another layout",
        ("serve", "base", "--engine", "llama.cpp"),
        "base: llama.cpp takes a GGUF; write one with: finetune export base --to gguf --out DIR",
    ),
    Mistake(
        "export that failed its proof",
        ("serve", "out", "--engine", "vllm"),
        "out: this export failed its proof; look with finetune verify, and export again",
        failed_proof,
    ),
    Mistake(
        "export changed since",
        ("serve", "out", "--engine", "llama.cpp"),
        "out/model.gguf: this file is not as it was exported",
        changed,
    ),
    Mistake(
        "open to others without a key",
        ("serve", "out", "--engine", "vllm", "--host", "0.0.0.0"),
        "with --host 0.0.0.0 other machines can reach this server: set a key with --api-key "
        "or FINETUNE_API_KEY",
        exported("adapter"),
    ),
    Mistake(
        "setting of the local engine",
        ("serve", "base", "--engine", "vllm", "--ui"),
        "--ui is a setting of the local engine; vllm has its own",
    ),
    Mistake(
        "limit of the local engine",
        ("serve", "base", "--engine", "llama.cpp", "--batch", "8"),
        "--batch is a setting of the local engine; llama.cpp has its own",
    ),
    Mistake(
        "setting of other engines",
        ("serve", "base", "--print"),
        "--print is a setting of the other engines; choose one with --engine",
    ),
    Mistake("report of no run", ("report", "runs/nowhere"), "runs/nowhere: there is no such run"),
    Mistake(
        "report of a folder",
        ("report", "base"),
        "base: this folder is not a run: it has no run.json",
    ),
]
