"""An export directory: written beside its place under another name, summed up, and moved there whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, writing
from finetune.manifest import MANIFEST, sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USAGE_POLICY*")


@contextmanager
def new_directory(out: Path, *, force: bool, resume: str | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and is removed when it does not.

    `resume` says what is written: what a killed export of the same left behind is then found in the folder.

    Raises:
        FinetuneError: `out` exists and `force` is off, or it cannot be written.
    """
    out = out.absolute()
    if out.exists() and not force:
        raise FinetuneError(
            "this exists already; choose another folder or use --force to replace it", at=str(out)
        )
    part, old, mark = (out.with_name(f".{out.name}.{what}") for what in ("part", "old", "mark"))
    with writing(out):
        _remove(old)
        if resume is None or not mark.is_file() or mark.read_text(encoding="utf-8") != resume:
            _remove(part)
        part.mkdir(parents=True, exist_ok=True)
        if resume is not None:
            mark.write_text(resume, encoding="utf-8")
    try:
        with writing(out):
            yield part
            if out.exists():
                out.rename(old)
            part.rename(out)
            _remove(old)
    finally:
        _remove(part)
        mark.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy the base's tokenizer and its terms, which whoever gets the export needs."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for pattern in LICENCES:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def write_manifest(
    folder: Path, facts: dict[str, Any], known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write finetune_export.json: the facts, and the sha256 of every other file of the folder.

    `known` are sums of files that were taken while writing them.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = [(path.relative_to(folder).as_posix(), path) for path in files]
    sums = {name: (known or {}).get(name) or sha256(path) for name, path in names}
    manifest = {**facts, "files": sums}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest
