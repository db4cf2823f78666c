"""Every Triton kernel with the types it is launched with, and compilation for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Ampere (A100), Hopper (H100, H200), Blackwell (B200).
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched: types of its arguments in order, constants, warps."""

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


def launches() -> dict[str, Launch]:
    """By name, the variants that training gpt-oss in bfloat16 launches."""
    from finetune.model.kernels import decode, rows, swiglu

    tile = {"ROWS": rows.ROWS, "COLUMNS": rows.COLUMNS}
    moved = {"rows": "i32", "eights": "i32", "x_eights": "i32", "out_eights": "i32"}
    gather = {"x": "*bf16", "index": "*i64", "out": "*bf16", **moved}
    combine = {"x": "*bf16", "place": "*i64", "scores": "*bf16", "out": "*bf16",
               "tokens": "i32", "eights": "i32", "x_eights": "i32"}  # fmt: skip
    dots = {"left": "*bf16", "right": "*bf16", "out": "*fp32", "rows": "i32", "eights": "i32",
            "left_eights": "i32", "right_eights": "i32"}  # fmt: skip
    numbers = {"alpha": "fp32", "limit": "fp32"}
    forward = {"y": "*bf16", "hidden": "*bf16", "rows": "i32", "eights": "i32",
               "hidden_eights": "i32", **numbers}  # fmt: skip
    backward = {"y": "*bf16", "d_hidden": "*bf16", "further": "*bf16", "score": "*fp32", "d_y": "*bf16",
                "rows": "i32", "eights": "i32", "d_hidden_eights": "i32", **numbers}  # fmt: skip
    decoded = {"words": "*i32", "scales": "*u8", "out": "*bf16", "block_count": "i32",
               "blocks_per_row": "i32", "row_eights": "i32"}  # fmt: skip
    swiglu_tile = {"ROWS": swiglu.ROWS, "COLUMNS": swiglu.COLUMNS}
    return {
        "decode": Launch("decode", "decode_kernel", decoded, {"BLOCKS": decode.BLOCKS_PER_PROGRAM}),
        "gather": Launch("rows", "gather_kernel", gather, tile, rows.WARPS),
        "combine, weighted": Launch(
            "rows", "combine_kernel", combine, {"TOP": 4, "WEIGHTED": True, **tile}, rows.WARPS
        ),
        "combine": Launch(
            "rows", "combine_kernel", combine, {"TOP": 4, "WEIGHTED": False, **tile}, rows.WARPS
        ),
        "row_dots": Launch("rows", "row_dots_kernel", dots, tile, rows.WARPS),
        "swiglu": Launch("swiglu", "forward_kernel", forward, swiglu_tile, swiglu.WARPS),
        "swiglu_gradient": Launch(
            "swiglu", "backward_kernel", backward, {"FURTHER": True, **swiglu_tile}, swiglu.WARPS
        ),
        "swiglu_gradient, no LoRA": Launch(
            "swiglu", "backward_kernel", backward, {"FURTHER": False, **swiglu_tile}, swiglu.WARPS
        ),
    }


@cache
def compile_ahead(name: str, target: str) -> dict[str, int]:
    """Registers a thread, spilled bytes, stack bytes and bytes of shared memory of a launch on `target`."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = launches()[name]
    module = importlib.import_module(f"finetune.model.kernels.{launch.module}")
    names = [*launch.types, *launch.constants]
    signature = {**launch.types, **dict.fromkeys(launch.constants, "constexpr")}
    multiple_of_16 = [["tt.divisibility", 16]]
    attributes = {
        (place,): multiple_of_16
        for place, argument in enumerate(names)
        if launch.types.get(argument, "").startswith("*")
    }
    source = ASTSource(getattr(module, launch.kernel), signature, dict(launch.constants), attributes)
    gpu = GPUTarget("cuda", TARGETS[target], 32)
    compiled = triton.compile(source, target=gpu, options={"num_warps": launch.warps})
    return {**_resources(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def _resources(cubin: bytes) -> dict[str, int]:
    """What the assembler laid out, as cuobjdump reads it from the binary."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        code = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    # A spill is a store to, and a load from, local memory.
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code.stdout))
    return {
        "registers": int(found["REG"]),
        "spills": spills,
        "stack_bytes": int(found["STACK"]),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4}\*/", code.stdout)),
        "wide_accesses": len(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*?\.128", code.stdout)),
        "accesses": len(re.findall(r"\b(?:LDG|STG)\.", code.stdout)),
    }
