"""What `finetune doctor` finds: versions, hardware, disk, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from finetune.model.native import multiplies


@dataclass(frozen=True)
class Package:
    """A package we depend on; `installed` is None when it is missing, `fits` False when out of range."""

    name: str
    wanted: str
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Diagnosis:
    """Memory and disk are in bytes; `native`: the dtypes in which the CPU multiplies packed weights as they
    are; `problems` are sentences, and none of them means that all is well."""

    python: str
    system: str
    cpus: int
    memory: int
    disk_free: int
    gpus: list[dict[str, Any]]
    native: list[str]
    packages: list[Package]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(folder: Path = Path(".")) -> Diagnosis:
    """Look at this machine; `folder` is where runs will be written."""
    packages = _packages()
    problems = [
        f"{p.name} is missing: pip install '{p.name}{p.wanted}'"
        if p.installed is None
        else f"{p.name} {p.installed} is outside the tested range {p.wanted}"
        for p in packages
        if not p.fits
    ]
    gpus, gpu_problem = _gpus()
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free=shutil.disk_usage(folder).free,
        gpus=gpus,
        native=[kind for kind in ("bfloat16", "float32") if multiplies(kind)],
        packages=packages,
        problems=problems + gpu_problem,
    )


def _packages() -> list[Package]:
    found = []
    for text in requires("gpt-oss-finetune") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            found.append(Package(wanted.name, str(wanted.specifier), None, False))
        else:
            fits = wanted.specifier.contains(installed, prereleases=True)
            found.append(Package(wanted.name, str(wanted.specifier), installed, fits))
    return found


def _gpus() -> tuple[list[dict[str, Any]], list[str]]:
    try:
        import torch
    except ImportError as error:
        return [], [f"torch cannot be loaded: {error}"]
    if not torch.cuda.is_available():
        if torch.version.cuda is None and Path("/dev/nvidiactl").exists():
            return [], ["there is an NVIDIA GPU, but this torch is built for the processor only"]
        return [], []
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "memory": total, "free": free, "capability": capability})
    return gpus, []
