"""The machine at hand: its first GPU by what the driver says, or its processor by a short measurement.

Neither loads torch here, which takes longer than everything else that `finetune check` does: `nvidia-smi` is
asked about GPUs, and a processor is measured in a process of its own, once; what it found is kept in
$FINETUNE_CACHE, or else in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.model.cpu_settings import ask_for_large_pages
from finetune.model.native import multiplies
from finetune.predict.machines import CUDA_CONTEXT, CUDA_SLACK, Machine, found_gpu

# What Python and the packages of a training process hold: 0.6 GB once they are imported, and what they load
# and set up in the first steps (measured: runs/reference/prediction.json).
CPU_IMPORTS = 0.6e9
CPU_LIBRARIES = CPU_IMPORTS + 0.15e9
# glibc gives freed blocks back only in part: the share of what came and went that was still resident,
# measured over the points of tests/measure/prediction.py.
CPU_SLACK = 0.05


def memory_here() -> Machine:
    """The machine at hand as far as its memory goes: what is free on the first GPU, or for this process."""
    device = first_gpu()
    if device is None:
        machine = _machine("this machine", "cpu", free_host_memory(), CPU_LIBRARIES, CPU_SLACK)
        return replace(machine, native=_native())
    # What the driver calls free is before our own context.
    return _machine(device["name"], "cuda", device["free"], CUDA_CONTEXT, CUDA_SLACK)


def _machine(name: str, kind: str, memory: float, libraries: float, slack: float) -> Machine:
    """One whose rates are not asked for."""
    return Machine(
        name=name, kind=kind, memory=memory, matrix={}, bandwidth=0.0, libraries=libraries, slack=slack
    )


def _native() -> tuple[str, ...]:
    kinds = {"bf16": "bfloat16", "float32": "float32"}
    return tuple(name for name, kind in kinds.items() if multiplies(kind))


def this_machine(dense: str) -> Machine:
    """The GPU that training would use, or the processor with its prices for computing in `dense`.

    Raises:
        FinetuneError: there is a GPU whose rates are not known, or measuring the processor failed.
    """
    device = first_gpu()
    if device is None:
        return _processor(_rates(dense))
    machine = found_gpu(device["name"], device["memory"])
    if machine is None:
        raise FinetuneError(f"the rates of {device['name']} are not known; --gpu names one to predict for")
    return replace(machine, memory=device["free"])


def first_gpu() -> dict[str, Any] | None:
    """Name, memory and free memory (bytes) of the first GPU that CUDA programs see; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or version("torch").endswith("+cpu"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    if visible:
        query.append(f"--id={visible.split(',')[0]}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        name, total, free = done.stdout.splitlines()[0].rsplit(",", 2)
        return {"name": name.strip(), "memory": float(total) * 2**20, "free": float(free) * 2**20}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def free_host_memory() -> float:
    """What programs may still take, without what a container's limit forbids."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _processor(rates: dict[str, Any]) -> Machine:
    return Machine(
        name=f"{rates['processor']}, {rates['threads']} threads",
        kind="cpu",
        memory=free_host_memory(),
        matrix=rates["matrix"],
        bandwidth=rates["bandwidth"],
        libraries=CPU_LIBRARIES,
        slack=CPU_SLACK,
        prices=rates["prices"],
        native=_native(),
        sheet_matrix=rates["matrix"]["bf16"],
        measured=True,
    )


def _rates(dense: str) -> dict[str, Any]:
    """Measured rates; from the cache where this machine and torch were measured before."""
    file = _cache_file(dense)
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_text())
        if isinstance(kept, dict):
            return kept
    ask_for_large_pages()  # as training has it
    done = subprocess.run(
        [sys.executable, "-m", "finetune.bench.rates", dense], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise FinetuneError(f"this machine's rates cannot be measured: {last}; --gpu predicts for a GPU")
    rates: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rates, indent=2) + "\n")
    return rates


def _cache_file(dense: str) -> Path:
    folder = (
        os.environ.get("FINETUNE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"
    )
    # Prices are those of our own code: they are found anew where any of it has changed.
    package = Path(__file__).parents[1]
    ours = [*package.glob("bench/*.py"), *package.glob("model/**/*"), package / "predict" / "units.py"]
    sources = sorted(file for file in ours if file.suffix in (".py", ".c", ".h"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    here = [platform.node(), platform.machine(), os.cpu_count(), os.environ.get("OMP_NUM_THREADS"), dense]
    key = hashlib.sha256(json.dumps([*here, version("torch"), code]).encode()).hexdigest()[:16]
    return Path(folder) / f"machine-{key}.json"
