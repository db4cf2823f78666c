"""A file that cannot be written to its end, for real: one sentence, and nothing half-written stays."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.export import export
from finetune.export.importing import import_model
from tests.export_kit import write_adapter, write_base

# More than the tokenizer has, less than the weights.
MOST_BYTES = 60_000


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more into any file is an OSError, as on a full disk, in whatever thread it happens."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", shards=1)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", base)


@pytest.mark.parametrize("to", ["adapter", "bf16", "gguf", "gguf-lora", "mxfp4", "openai", "sglang-lora"])
def test_nothing_stays_of_a_tuned_model(adapter: Path, tmp_path: Path, to: str) -> None:
    with (
        files_of_at_most(MOST_BYTES),
        pytest.raises(FinetuneError, match="cannot be written: File too large"),
    ):
        export(adapter, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["bf16", "gguf", "openai"])
def test_nothing_stays_of_a_base_and_what_was_there_is_kept(base: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with (
        files_of_at_most(MOST_BYTES),
        pytest.raises(FinetuneError, match="cannot be written: File too large"),
    ):
        export(base, to, tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_nothing_stays_of_an_import(base: Path, tmp_path: Path) -> None:
    export(base, "gguf", tmp_path / "gguf")
    with (
        files_of_at_most(MOST_BYTES),
        pytest.raises(FinetuneError, match="cannot be written: File too large"),
    ):
        import_model(tmp_path / "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]
