"""Everything that a GPU is needed for, within a time: correctness, rates, then the table row by row.

    python -m tests.gpu [--seconds 560] [--out DIR] [--device cpu] [--rows PART ...] [--no-checks]

Each part runs in a process of its own, so that memory limits and failures stay with it. What is found is
written to DIR (or $OUT) as it comes, and a short table is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from finetune.bench.conditions import conditions
from tests.gpu.table import ROWS

SLOWEST_ROW = 240.0  # seconds; a row that takes longer hangs
# As `finetune train` has it: rows are trained close to their cards' limits.
ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}

# What is held against what; resident experts at rank 16, whose products differ by less than 1%.
RATIOS = (
    ("ours over stock (goal 2)", "20b, ours beside stock", "20b, stock transformers + PEFT"),
    ("on host over resident (goal 0.6)", "120b, 24 GB card, experts on host", "120b, 32k tokens"),
)


class Session:
    """Runs parts until time is up and keeps what they print."""

    def __init__(self, device: str, seconds: float, out: Path) -> None:
        self.device, self.until, self.file = device, time.monotonic() + seconds, out / "gpu.json"
        self.found: dict[str, Any] = {"conditions": _about(device)}

    def run(self, name: str, *command: str, most: float = SLOWEST_ROW) -> dict[str, Any]:
        """The JSON that a part prints last, or why there is none."""
        left = min(most, self.until - time.monotonic())
        if left < 20:
            return self._keep(name, {"not_run": "time was up"})
        began = time.monotonic()
        line = [sys.executable, "-m", *command, "--device", self.device]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=left, env=ENVIRONMENT)
        except subprocess.TimeoutExpired as error:
            said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
            return self._keep(name, {"not_run": f"took longer than {left:.0f} s", "stderr": said[-1500:]})
        result: dict[str, Any]
        if done.returncode:
            result = {"not_run": "failed", "stderr": done.stderr[-3000:]}
        else:
            result = json.loads(done.stdout.strip().splitlines()[-1])
        result["took_seconds"] = round(time.monotonic() - began, 1)
        return self._keep(name, result)

    def _keep(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        self.found[name] = result
        self.file.write_text(json.dumps(self.found, indent=2) + "\n")
        print(f"{name}: {_in_short(result)}", flush=True)
        return result


def _about(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        **conditions(),
        "gpu": gpu.name if gpu else None,
        "gpu_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda,
    }


def _in_short(result: dict[str, Any]) -> str:
    if "not_run" in result:
        last = result.get("stderr", "").strip().splitlines()
        return f"not run: {result['not_run']}" + (f" ({last[-1][:200]})" if last else "")
    if "tokens_per_second" in result:
        peak = result.get("peak_reserved_gb", float("nan"))
        return f"{result['tokens_per_second']:,.0f} tokens/s, {peak} GB, loss {result['losses'][0]:.3f}"
    return f"{result.get('took_seconds', 0)} s"


def table(found: dict[str, Any]) -> str:
    """Rows with what they reached and what they were meant to."""
    lines = [f"{'':36}{'tokens/s':>10}{'goal':>9}{'peak GB':>9}{'goal':>7}"]
    for name, row in ROWS.items():
        result = found.get(name, {"not_run": "left out"})
        if "not_run" in result:
            lines.append(f"{name:36}  {_in_short(result)[:80]}")
            continue
        peak = result.get("peak_reserved_gb", float("nan"))
        speed = f"{row.speed:,.0f}" if row.speed else "runs"
        memory = f"{row.memory:g}" if row.memory < 1000 else "-"
        lines.append(f"{name:36}{result['tokens_per_second']:>10,.0f}{speed:>9}{peak:>9.1f}{memory:>7}")
    for title, over, under in RATIOS:
        pair = [found.get(name, {}).get("tokens_per_second") for name in (over, under)]
        if all(pair):
            lines.append(f"{title:36}{pair[0] / pair[1]:>10.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a trial, tiny sizes")
    parser.add_argument("--rows", nargs="*", default=None, help="only rows whose names contain one of these")
    parser.add_argument("--no-checks", action="store_true", help="the table alone")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options.device, options.seconds, options.out)
    right = True
    if not options.no_checks:
        checks = session.run("correctness", "tests.gpu.correctness")
        parts = {name: part for name, part in checks.items() if isinstance(part, dict)}
        right = bool(parts) and all(part["right"] for part in parts.values())
        for name, part in parts.items():
            print(f"  {name}: {'right' if part['right'] else part['wrong']}", flush=True)
        session.run("rates", "tests.gpu.rates", most=90)
    for name in ROWS:
        if options.rows is None or any(part in name for part in options.rows):
            profile = ("--profile",) if name == next(iter(ROWS)) else ()
            session.run(name, "tests.gpu.table", name, *profile)
    print(json.dumps(session.found.get("rates", {})))
    print("correctness: " + ("not looked at" if options.no_checks else "right" if right else "WRONG"))
    print(table(session.found))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
