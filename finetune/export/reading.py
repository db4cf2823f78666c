"""An export read back by this program, in the released layout: what its judge is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune.export import openai
from finetune.export.gguf import FILE as GGUF_FILE
from finetune.export.importing import import_model
from finetune.export.subject import Base, Subject
from finetune.model import fingerprint


@contextmanager
def read_back(export_format: str, folder: Path) -> Iterator[Subject]:
    """The model in an export of a whole model: its own folder, or what importing it gives, unrounded."""
    if export_format not in ("gguf", "openai"):
        yield _subject(folder)
        return
    source = folder / (GGUF_FILE if export_format == "gguf" else openai.FOLDER)
    with TemporaryDirectory(prefix="finetune-read-") as scratch:
        import_model(source, Path(scratch) / "model", tokenizer=folder, exact=True)
        yield _subject(Path(scratch) / "model")


def _subject(folder: Path) -> Subject:
    return Subject(Base(str(folder), folder), fingerprint(folder), None, None)
