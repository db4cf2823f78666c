"""The same run on nano through the expert layer's back end for CPUs and through that for GPUs.

    python -m tests.measure.gpu_path [--record]

Both on this machine's CPU, the latter with its kernels replaced by plain torch. Prints every loss and norm of
the gradients of both, and their largest relative difference.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from finetune.model import experts
from finetune.train.__main__ import main as train
from tests.gpu.models import take_the_gpu_path
from tests.measure.conditions import print_or_record
from tests.train_helpers import read_metrics, write_project

STEPS = 20


def trained() -> dict[str, list[float]]:
    """By figure, its values over the steps; the held-out loss comes before the first and after the last."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        recipe = write_project(Path(folder))
        keys = ["model.base=nano", f"train.max_steps={STEPS}", "train.learning_rate=1e-3"]
        assert train([str(recipe), *keys]) == 0
        rows = read_metrics(Path("runs/latest"))
    return {name: [row[name] for row in rows if name in row] for name in ("loss", "grad_norm", "eval_loss")}


def measure() -> dict[str, Any]:
    of_cpus, chosen = trained(), experts._back_end_for
    take_the_gpu_path()
    try:
        of_gpus = trained()
    finally:
        experts._back_end_for = chosen
    differences = {
        name: max(abs(a - b) / abs(a) for a, b in zip(values, of_gpus[name], strict=True))
        for name, values in of_cpus.items()
    }
    return {"cpu": of_cpus, "gpu": of_gpus, "largest_relative_difference": differences}


if __name__ == "__main__":
    print_or_record("gpu_path", "python -m tests.measure.gpu_path", measure)
