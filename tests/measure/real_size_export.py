"""Exports of a full-size checkpoint by the real command: time, memory, GB/s beside `cp` of the same bytes.

    python -m tests.measure.real_size_export CHECKPOINT [--to gguf mxfp4] [--layers N] [--record]

CHECKPOINT is a gpt-oss directory in the released layout; random weights do, as shapes, speed and memory are
the same. gguf is of the model as it is; mxfp4 has a random adapter of rank 8 merged in, fitted to
conversations of this repository, and with `--layers` is killed after so many, as the record then says. A
measurement of mxfp4 that was itself killed goes on in the same `--scratch`, and says how often it has.
Memory is the largest seen of the process: anonymous (what it holds) and resident (mapped files with it).
Files leave the cache before they are read, and are on the disk when the clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.export.peft_files import CONFIG, DOWN, GATE_UP, WEIGHTS, Sizes
from finetune.export.progress import FILE as PROGRESS
from finetune.export.tensors import Planned, write_safetensors
from tests.measure.conditions import REFERENCE, record

NAME = "real_size_export"
RANK, ALPHA = 8, 16
# Moves a weight by a few hundredths of its size, as a training of a day does.
SPREAD = 0.01
TALK = Path(__file__).resolve().parents[2] / "recipes" / "nano" / "data" / "stock-codes.jsonl"
PROGRAM = [sys.executable, "-c", "from finetune.cli import main; main()"]
SECONDS_BETWEEN_SAMPLES = 0.02
LONGEST_LOOK = 2.0  # seconds
KIB_PER_GB = 1e9 / 1024
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class Watched:
    """What was seen of a command while it ran."""

    seconds: float = 0.0
    now_gb: float = 0.0  # anonymous
    anonymous_gb: float = 0.0
    resident_gb: float = 0.0
    layer_seconds: list[float] = field(default_factory=list)
    layer_gb: list[float] = field(default_factory=list)  # the most that was anonymous
    stopped_seconds: float = 0.0  # from outside; these count nowhere else
    resumed: int = 0

    @classmethod
    def kept(cls, file: Path) -> Watched:
        """What was seen before this program was killed, or nothing yet."""
        if not file.is_file():
            return cls()
        before = cls(**json.loads(file.read_text(encoding="utf-8")))
        return replace(before, resumed=before.resumed + 1)

    def figures(self) -> dict[str, Any]:
        peak = {"peak_anonymous_gb": self.anonymous_gb, "peak_resident_gb": self.resident_gb}
        figures = {"seconds": round(self.seconds, 1), **{k: round(v, 2) for k, v in peak.items()}}
        layers = [round(one, 1) for one in self.layer_seconds]
        rare = {
            "layer_seconds": layers,
            "layer_anonymous_gb": [round(one, 2) for one in self.layer_gb],
            "stopped_seconds": round(self.stopped_seconds, 1),
            "resumed": self.resumed,
        }
        return {**figures, **{name: figure for name, figure in rare.items() if figure}}


def write_adapter(checkpoint: Path, folder: Path) -> Path:
    """A random adapter of attention and all experts, in PEFT's layout and bf16, written layer by layer."""
    sizes = Sizes.of(checkpoint)
    many = dict.fromkeys((f"self_attn.{one}" for one in ATTENTION), 1)
    many |= {"mlp.experts.base_layer": sizes.experts, "mlp.experts": sizes.experts}
    tensors = []
    for layer in range(sizes.layers):
        for place, experts in many.items():
            inputs, outputs = sizes.in_out(place)
            name = f"base_model.model.model.layers.{layer}.{place}"
            tensors.append(_normal(f"{name}.lora_A.weight", (RANK * experts, inputs), inputs**-0.5))
            tensors.append(_normal(f"{name}.lora_B.weight", (outputs, RANK * experts), SPREAD))
    folder.mkdir()
    write_safetensors(folder / WEIGHTS, tensors)
    config = {
        "base_model_name_or_path": str(checkpoint),
        "bias": "none",
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(ATTENTION),
        "target_parameters": [GATE_UP, DOWN],
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _normal(name: str, shape: tuple[int, int], spread: float) -> Planned:
    def pieces() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        yield (torch.randn(*shape, generator=generator) * spread).bfloat16()

    return Planned(name, "BF16", shape, pieces)


def watch(
    words: list[str], stop: Callable[[Watched], bool] | None = None, seen: Watched | None = None
) -> Watched:
    """Run a command and look at its memory, adding to what was `seen`; `stop` may end it early.

    Raises:
        SystemExit: the command failed.
    """
    seen = seen or Watched()
    last = time.perf_counter()
    process = subprocess.Popen(words)
    while process.poll() is None:
        last = _count(seen, last)
        seen.now_gb, resident = _memory(process.pid)
        seen.anonymous_gb = max(seen.anonymous_gb, seen.now_gb)
        seen.resident_gb = max(seen.resident_gb, resident)
        if stop and stop(seen):
            process.kill()
            process.wait()
            break
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    else:
        if process.returncode:
            raise SystemExit(f"{words} ended with {process.returncode}")
    last = _count(seen, last)
    os.sync()
    seen.seconds += time.perf_counter() - last
    return seen


def _count(seen: Watched, last: float) -> float:
    """Add the time since `last`; where this program did not get to look, it and the command were stopped."""
    now = time.perf_counter()
    if now - last > LONGEST_LOOK:
        seen.stopped_seconds += now - last
    else:
        seen.seconds += now - last
    return now


def _memory(pid: int) -> tuple[float, float]:
    """Anonymous and resident memory now, in GB; nothing of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return int(found.get("RssAnon", 0)) / KIB_PER_GB, int(found.get("VmRSS", 0)) / KIB_PER_GB


def forget(checkpoint: Path) -> int:
    """Have the kernel drop a checkpoint's shards from its cache; returns how many bytes they have."""
    shards = list(checkpoint.glob("*.safetensors"))
    for shard in shards:
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sum(shard.stat().st_size for shard in shards)


def measure_cp(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    out, size = scratch / "copy", forget(checkpoint)
    out.mkdir()
    seen = watch(["cp", *map(str, checkpoint.glob("*.safetensors")), str(out)])
    shutil.rmtree(out)
    return {
        "gigabytes": round(size / 1e9, 2),
        "gb_per_second": round(size / 1e9 / seen.seconds, 3),
        **seen.figures(),
    }


def measure_gguf(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    out, size = scratch / "gguf", forget(checkpoint)
    seen = watch([*PROGRAM, "export", str(checkpoint), "--to", "gguf", "--out", str(out)])
    proof = json.loads((out / "finetune_export.json").read_text(encoding="utf-8"))["proof"]
    shutil.rmtree(out)
    return {"gb_per_second": round(size / 1e9 / seen.seconds, 3), **seen.figures(), "proof": proof}


def measure_mxfp4(checkpoint: Path, scratch: Path, layers: int | None) -> dict[str, Any]:
    """All layers, or the first few of them and nothing of what follows."""
    adapter, out = scratch / "adapter", scratch / "mxfp4"
    if not (adapter / CONFIG).is_file():
        write_adapter(checkpoint, adapter)
    kept, file = scratch / ".mxfp4.part" / PROGRESS, scratch / "seen.json"
    before = Watched.kept(file)
    marks, most = [(time.time(), before.seconds)], [0.0]

    def look(seen: Watched) -> bool:
        most[-1] = max(most[-1], seen.now_gb)
        try:
            at = kept.stat().st_mtime
        except FileNotFoundError:
            return False
        if at > marks[-1][0]:
            seen.layer_seconds.append(seen.seconds - marks[-1][1])
            marks.append((at, seen.seconds))
            seen.layer_gb.append(most[-1])
            most.append(0.0)
            file.write_text(json.dumps(asdict(seen)), encoding="utf-8")
        return len(seen.layer_seconds) == layers

    words = ["export", str(adapter), "--base", str(checkpoint), "--to", "mxfp4", "--out", str(out)]
    seen = watch([*PROGRAM, *words, "--calibrate", str(TALK), "--kept-at-least", "-1e9"], look, before)
    all_layers = Sizes.of(checkpoint).layers
    figures = {"layers": f"{len(seen.layer_seconds)} of {all_layers}", "rank": RANK, **seen.figures()}
    if (out / "finetune_export.json").is_file():
        manifest = json.loads((out / "finetune_export.json").read_text(encoding="utf-8"))
        return {**figures, "proof": manifest["proof"]}
    return {**figures, "killed": "after these layers, so nothing was proven"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--to", nargs="+", choices=("gguf", "mxfp4"), default=["gguf", "mxfp4"])
    parser.add_argument("--layers", type=int, help="of mxfp4, do only so many")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="a folder of its own, with room for a copy; beside CHECKPOINT if not given",
    )
    parser.add_argument("--beside", help="what else ran on the machine, to be recorded with the figures")
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    scratch = options.scratch or Path(tempfile.mkdtemp(dir=options.checkpoint.resolve().parent))
    scratch.mkdir(parents=True, exist_ok=True)
    if "gguf" in options.to:
        figures["cp"] = measure_cp(options.checkpoint, scratch)
        figures["gguf"] = measure_gguf(options.checkpoint, scratch)
        figures["gguf"]["times_cp"] = round(figures["gguf"]["seconds"] / figures["cp"]["seconds"], 2)
    if "mxfp4" in options.to:
        figures["mxfp4"] = measure_mxfp4(options.checkpoint, scratch, options.layers)
    shutil.rmtree(scratch)
    if options.beside:
        for one in figures.values():
            one["beside"] = options.beside
    print(json.dumps(figures, indent=2))
    if options.record:
        print(record(NAME, "python -m tests.measure.real_size_export CHECKPOINT", {**earlier(), **figures}))


def earlier() -> dict[str, Any]:
    """The figures that are recorded already: of formats that are not measured anew they stay."""
    file = REFERENCE / f"{NAME}.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return found


if __name__ == "__main__":
    main()
