"""The record of an export, finetune_export.json: what it is, and the sha256 of each of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError

MANIFEST = "finetune_export.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """An export's record, its files checked against their sums.

    Raises:
        FinetuneError: there is none, or a file is missing or not as it was written.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        files, _ = manifest["files"], manifest["format"]
    except OSError:
        raise FinetuneError(f"this is not an export: it has no {MANIFEST}", at=str(folder)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise FinetuneError(f"this record cannot be read: {error!r}", at=str(file)) from error
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise FinetuneError("this file of the export is missing", at=str(folder / name))
        if sha256(folder / name) != digest:
            raise FinetuneError("this file is not as it was exported", at=str(folder / name))
    return dict(manifest)
