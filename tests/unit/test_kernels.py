"""Triton kernels without a GPU: right under the interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.interpreted_kernels import KERNELS
from tests.kernel_kit import TARGETS, compile_ahead, launches

ROOT = Path(__file__).resolve().parents[2]
# float32: roundings of sums of a thousand terms. bfloat16: the interpreter cuts it off where a GPU rounds,
# up to 2 ** -7 of the value.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Relative errors against float64, by kernel and dtype; the interpreter wants a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.interpreted_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_right_and_writes_its_own_place_alone(
    errors: dict[str, dict[str, float]], kernel: str
) -> None:
    for dtype, error in errors[kernel].items():
        assert error <= (0 if kernel in ("decode", "gather") else TOLERANCE[dtype]), dtype


def test_the_expert_layer_on_these_kernels_is_right_with_all_its_gradients(
    errors: dict[str, dict[str, float]],
) -> None:
    assert len(errors["whole layer"]) == 7
    assert max(errors["whole layer"].values()) < 1e-5


def test_every_kernel_of_the_package_is_among_those_compiled() -> None:
    sources = (ROOT / "finetune" / "model" / "kernels").glob("*.py")
    defined = sum(source.read_text().count("_kernel(\n") for source in sources)
    assert len({(launch.module, launch.kernel) for launch in launches().values()}) == defined


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", launches())
def test_a_kernel_compiles_without_spills_and_moves_16_bytes_at_once(name: str, target: str) -> None:
    found = compile_ahead(name, target)
    assert found["spills"] == 0 and found["stack_bytes"] == 0
    # 8 warps of 128 registers, or 16 of 64, are what it takes to keep the memory busy.
    assert found["registers"] <= 128
    # Only indices, scales and scores come in smaller pieces.
    assert found["wide_accesses"] >= found["accesses"] / 3
    assert found["shared_bytes"] <= 48 << 10
