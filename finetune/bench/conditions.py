"""What every measurement records beside its figures: versions, hardware, date; and where it is kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors")
KIB_PER_GIB = 1 << 20
# Writing it to /proc/self/clear_refs makes VmHWM start again from what is resident now (man 5 proc).
_RESET_PEAK = "5"


def conditions() -> dict[str, Any]:
    """Versions, processor, cores, memory, GPUs and date."""
    import torch

    info = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in info if line.startswith("flags")), "")
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "processor": next(
            (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown"
        ),
        "bf16_instructions": "avx512_bf16" in flags or "amx_bf16" in flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def resident_gib(field: str = "VmHWM") -> float:
    """A line of /proc/self/status in GiB: VmHWM (peak), VmRSS (now), RssAnon (now, without mapped files)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / KIB_PER_GIB
    return float("nan")


def forget_peak() -> None:
    """Let the peak resident size begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def record(folder: Path, name: str, command: str, figures: dict[str, Any]) -> Path:
    """Keep figures as `folder`/`name`.json with the command that made them and the conditions."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(
        json.dumps({"command": command, "conditions": conditions(), "figures": figures}, indent=2) + "\n"
    )
    return file
