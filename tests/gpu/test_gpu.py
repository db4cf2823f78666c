"""On a GPU: everything is right. Without one: the programs for GPUs run, on tiny sizes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from finetune.model import experts
from finetune.model.kernels.wide import Wide
from tests.gpu import correctness, table
from tests.gpu.__main__ import table as table_of
from tests.gpu.wheels import strip

CPU = torch.device("cpu")
# Those that take seconds on a CPU; the others differ in sizes alone, or are in tests/unit.
TRIED_CHECKS = (correctness.expert_layer, correctness.streamed_experts, correctness.attention)
TRIED_ROWS = (
    "20b, 8k context, 16k tokens",
    "20b, stock transformers + PEFT",
    "120b, 24 GB card, experts on host",
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("check", correctness.CHECKS, ids=lambda check: check.__name__)
def test_on_this_gpu(check: correctness.Check) -> None:
    wrong = {name: error for name, error in check(torch.device("cuda")).items() if not error[0] <= error[1]}
    assert not wrong


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_back_end_for", Wide.on)


@pytest.mark.parametrize("check", TRIED_CHECKS, ids=lambda check: check.__name__)
def test_a_check_runs_and_finds_nothing_wrong_without_a_gpu(gpu_path: None, check: correctness.Check) -> None:
    errors = check(CPU)
    assert errors and all(found <= allowed for found, allowed in errors.values())


@pytest.mark.parametrize("name", TRIED_ROWS)
def test_a_row_runs_at_a_tiny_size_without_a_gpu(gpu_path: None, name: str) -> None:
    figures = table.run(table.for_trial(table.ROWS[name]), CPU)
    assert figures["losses"][-1] < figures["losses"][0] and figures["tokens_per_second"] > 0


def test_the_table_says_what_was_reached_and_why_a_row_is_empty() -> None:
    first, second, *_ = table.ROWS
    reached = {"tokens_per_second": 12_000.0, "peak_reserved_gb": 79.0, "losses": [1.0]}
    found = {
        "120b, 32k tokens": reached,
        "120b, 24 GB card, experts on host": {**reached, "tokens_per_second": 9_000.0},
        first: {"tokens_per_second": 19_000.0, "peak_reserved_gb": 31.0, "losses": [1.0]},
        second: {"not_run": "failed", "stderr": "Traceback\nboom"},
    }
    lines = table_of(found).splitlines()
    assert lines[1].split()[-4:] == ["19,000", "18,000", "31.0", "40"]
    assert "not run: failed (boom)" in lines[2] and "not run: left out" in lines[3]
    assert lines[-1].startswith("on host over resident (goal 0.6)") and lines[-1].endswith(" 0.75")


def test_a_stripped_wheel_keeps_one_cuda_library_and_a_record_that_agrees(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-0-py3-none-any.whl"
    files = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda118", "cuda130", "rocm62")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.writestr(file, "machine code")
        archive.writestr(
            "bitsandbytes-0.dist-info/RECORD", "\n".join(f"{file},sha256=x,12" for file in files)
        )
    strip(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        left, record = archive.namelist(), archive.read("bitsandbytes-0.dist-info/RECORD").decode()
    assert left == [files[0], files[2], "bitsandbytes-0.dist-info/RECORD"]
    assert [line.split(",")[0] for line in record.splitlines()] == [files[0], files[2]]
