"""Triton kernels without a GPU: error under the interpreter, and what the compiler made of them.

    python -m tests.measure.kernels [--record]

`registers` a thread, `spills` (accesses to local memory), `stack_bytes` and `shared_bytes` of each kernel for
each target; `wide_accesses` of all `accesses` to the GPU's memory move 16 bytes a thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.kernel_kit import TARGETS, compile_ahead, launches
from tests.measure.conditions import print_or_record


def measure() -> dict[str, Any]:
    """Errors by kernel and dtype, resources by kernel and target."""
    import triton

    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.interpreted_kernels"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {
        "triton": triton.__version__,
        "error_under_the_interpreter": json.loads(done.stdout),
        "compiled": {
            name: {target: compile_ahead(name, target) for target in TARGETS} for name in launches()
        },
    }


if __name__ == "__main__":
    print_or_record("kernels", "python -m tests.measure.kernels", measure)
