"""What a bare GPU machine lacks, gathered into a folder to carry along: less than 64 MB, for Python 3.12.

    python -m tests.gpu.wheels FOLDER [--cuda 130] [--python 3.12]

There, `pip install --no-index --no-deps --target SITE FOLDER/*.whl` and `PYTHONPATH=SITE`. torch, triton,
transformers, accelerate, pyarrow and pandas have to be there. Of bitsandbytes' libraries, one for each
version of CUDA, one alone is kept.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

# With what these need and a machine for training does not have.
PACKAGES = (
    "trl", "datasets", "bitsandbytes", "peft", "dill", "multiprocess", "pydantic", "pydantic_core",
    "annotated-types", "typing-inspection", "ruamel.yaml", "pytest", "pluggy", "iniconfig", "hypothesis",
    "sortedcontainers",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
LIMIT = 64 << 20
ROOT = Path(__file__).resolve().parents[2]


def gather(folder: Path, cuda: str, python: str) -> int:
    """Download at the versions of constraints.txt, strip bitsandbytes; returns the bytes of it all."""
    pins = dict(
        line.strip().lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    names = [f"{name}=={pins[name.lower()]}" for name in PACKAGES]
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    target = [f"--python-version={python}", "--implementation=cp", "-d", str(folder)]
    subprocess.run([*command, *target, *platforms, *names], check=True)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        strip(wheel, cuda)
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def strip(wheel: Path, cuda: str) -> None:
    """Leave out of bitsandbytes every library for another CUDA, and from its record."""
    library = re.compile(r"libbitsandbytes_(cuda|rocm|xpu)(?!" + cuda + r"\.)")
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as kept:
        for name in whole.namelist():
            if library.search(name):
                continue
            data = whole.read(name)
            if name.endswith("RECORD"):
                data = b"\n".join(line for line in data.split(b"\n") if not library.search(line.decode()))
            kept.writestr(name, data)
    part.rename(wheel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuda", default="130")
    parser.add_argument("--python", default="3.12")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    size = gather(options.folder, options.cuda, options.python)
    print(f"{size / 1e6:.1f} MB in {options.folder}")
    return 0 if size < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
