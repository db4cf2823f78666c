"""The native libraries are made once and are never needed."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.model.native.decoder import native_decoder
from finetune.model.native.products import native_products


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    for found in (native_decoder, native_products):
        found.cache_clear()
    yield tmp_path / "cache"
    for found in (native_decoder, native_products):
        found.cache_clear()


def compiler_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "cc"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))


def test_the_library_is_compiled_once_and_leaves_nothing_else(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native_decoder(torch.bfloat16) is None:
        pytest.skip("no C compiler, or no AVX-512")
    assert [file.suffix for file in empty_cache.iterdir()] == [".so"]
    compiler_that("exit 1", tmp_path, monkeypatch)
    assert native_decoder(torch.float32) is not None


@pytest.mark.parametrize(
    "does", ["exit 1", 'shift 4; echo "no library" > "$2"'], ids=["fails", "writes junk"]
)
def test_a_compiler_that_does_not_work_leaves_the_work_to_torch(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that(does, tmp_path, monkeypatch)
    assert native_decoder(torch.bfloat16) is None and native_products(torch.float32) is None


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_decoder(torch.bfloat16) is None and native_products(torch.float32) is None


def test_the_environment_can_forbid_it(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_NATIVE", "0")
    assert native_decoder(torch.bfloat16) is None and native_products(torch.float32) is None
    assert not empty_cache.exists()
